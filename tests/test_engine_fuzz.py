"""Random traffic through real engines: a few scenarios of many (see `engine_fuzz`)."""

import os

import pytest
from engine_fuzz import play
from speculation import NGRAM, own_process

pytestmark = pytest.mark.engine

ARENAS = int(os.environ.get("LEANK_FUZZ_ARENAS", "3"))
SPECULATIVE_ARENAS = int(os.environ.get("LEANK_FUZZ_SPECULATIVE_ARENAS", "1"))
SCENARIOS = int(os.environ.get("LEANK_FUZZ_SCENARIOS", "4"))
"""More than a test run needs: 20 arenas of 25 scenarios take some ten minutes."""


@pytest.mark.parametrize("seed", range(ARENAS))
def test_random_traffic_is_answered_as_the_oracle_would(tiny_llama_dir, seed):
    assert play(seed, tiny_llama_dir, SCENARIOS)["finished"] > SCENARIOS


@pytest.mark.parametrize("seed", range(SPECULATIVE_ARENAS))
def test_random_traffic_with_drafts_is_answered_as_the_oracle_would(tiny_llama_dir, seed):
    """A random model seldom repeats itself: most drafts are rejected, many across a boundary."""
    with own_process() as run:
        counts = run(play, seed, tiny_llama_dir, SCENARIOS, NGRAM)
    assert counts["finished"] > SCENARIOS
    assert min(counts["accepted"], counts["rolled back"]) > 0
