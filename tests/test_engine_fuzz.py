"""Random traffic through real engines: a few scenarios of many (see `engine_fuzz`)."""

import os

import pytest
from engine_fuzz import arena

pytestmark = pytest.mark.engine

ARENAS = int(os.environ.get("LEANK_FUZZ_ARENAS", "3"))
SCENARIOS = int(os.environ.get("LEANK_FUZZ_SCENARIOS", "4"))
"""More than a test run needs: 20 arenas of 25 scenarios take some ten minutes."""


@pytest.mark.parametrize("seed", range(ARENAS))
def test_random_traffic_is_answered_as_the_oracle_would(tiny_llama_dir, seed):
    with arena(seed, tiny_llama_dir) as engine:
        preempted = engine.running.watch_preemptions()
        for scenario in range(SCENARIOS):
            engine.scenario(scenario)
        print(f"arena {seed}: {engine.counts}, {len(preempted)} preemptions")
    assert engine.counts["finished"] > SCENARIOS
