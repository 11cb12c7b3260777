"""Random traffic through real engines: a few scenarios of many (see `engine_fuzz`)."""

import os

import pytest
from archive_definition import PACKED
from engine_fuzz import Arrival, arena, play, shrink
from format_samples import format_of
from speculation import NGRAM, own_process
from test_engine_answers import long
from test_manager_fuzz import frees_a_page_too_many
from vllm.v1.core.sched.utils import check_stop

from vllm_leank.core.formats import NATIVE, known_formats
from vllm_leank.core.selection import SEGMENT

pytestmark = pytest.mark.engine

ARENAS = int(os.environ.get("LEANK_FUZZ_ARENAS", "3"))
SPECULATIVE_ARENAS = int(os.environ.get("LEANK_FUZZ_SPECULATIVE_ARENAS", "1"))
SCENARIOS = int(os.environ.get("LEANK_FUZZ_SCENARIOS", "4"))
"""More than a test run needs: 20 arenas of 25 scenarios take some ten minutes."""
DRAFTS_FROM_TEXT = range(2, 2 + SPECULATIVE_ARENAS)
DRAFTS_OF_A_MODEL = range(2 + SPECULATIVE_ARENAS, 2 + 2 * SPECULATIVE_ARENAS)
CODES, CODES_PRUNED = 2, 5
"""Seeds whose far tokens are codes; in the second prompts are read pruned, too."""


def played(seeds, short=None):
    """All scenarios of the seeds, which are long, and one of a seed that is `short`."""
    cases = [pytest.param(seed, range(SCENARIOS), id=str(seed), marks=long) for seed in seeds]
    if short is not None:
        cases.insert(0, pytest.param(short, range(1), id=f"{short}-short"))
    return pytest.mark.parametrize(("seed", "scenarios"), cases)


def test_every_archive_format_is_played():
    """With drafts those that round; test_speculation.py has the other."""
    every = {one.name for one in known_formats()}
    assert {format_of(seed).name for seed in range(ARENAS)} == every
    assert format_of(CODES) == format_of(CODES_PRUNED) == PACKED
    seeds = (*DRAFTS_FROM_TEXT, *DRAFTS_OF_A_MODEL)
    assert {format_of(seed).name for seed in seeds} >= every - {NATIVE.name}


@played(range(ARENAS), short=CODES)
def test_random_traffic_is_answered_as_the_oracle_would(tiny_llama_dir, seed, scenarios):
    assert play(seed, tiny_llama_dir, scenarios)["finished"] > len(scenarios)


@played(DRAFTS_FROM_TEXT)
def test_random_traffic_with_drafts_is_answered_as_the_oracle_would(
    tiny_llama_dir, seed, scenarios
):
    """A random model seldom repeats itself: most drafts are rejected, many across a boundary. Each
    costs a process of its own; a model that drafts does not.
    """
    with own_process() as run:
        counts = run(play, seed, tiny_llama_dir, scenarios, NGRAM)
    assert counts["finished"] > len(scenarios)
    assert min(counts["accepted"], counts["rolled back"]) > 0


@played(DRAFTS_OF_A_MODEL, short=CODES_PRUNED)
def test_a_model_with_other_heads_may_draft(tiny_llama, tiny_llama_dir, seed, scenarios):
    """It knows nothing of the served one, so nearly all that it drafts is rejected."""
    draft = tiny_llama(head_dim=96, layers=3, kv_heads=1, group=2)
    speculation = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 5}
    counts = play(seed, tiny_llama_dir, scenarios, speculation)
    assert counts["finished"] > len(scenarios)
    assert counts["rolled back"] > 0


@long
def test_random_traffic_that_selects_is_answered_as_the_oracle_would(tiny_llama, monkeypatch):
    """Requests are short here: queries of the third layer read 2 of up to 7 segments. A short test
    is in `test_engine_selection.py`.
    """
    monkeypatch.setattr("vllm_leank.core.selection.FEWEST_TOKENS", 2 * SEGMENT)
    with arena(CODES, tiny_llama(layers=3), pages=2 * SEGMENT) as engine:
        assert engine.running.plan.archive_format == PACKED
        engine.scenarios(range(SCENARIOS // 2))
        assert engine.counts["finished"] > SCENARIOS // 2
        scenario = (Arrival(tuple(range(350)), 140, 0),)
        engine.run(scenario)
        engine.oracle.selection = None
        with pytest.raises(AssertionError, match="a prompt of 350 tokens gets"):
            engine.run(scenario)


def test_a_failing_scenario_shrinks_to_what_fails():
    scenario = tuple(Arrival(tuple(range(300)), 140, wait, 9) for wait in range(8))

    def fails(scenario):
        return sum(len(one.prompt) >= 65 and one.max_tokens >= 33 for one in scenario) >= 2

    small = shrink(scenario, fails, tries=1000)
    assert [(len(one.prompt), one.max_tokens, one.wait, one.abort) for one in small] == [
        (76, 44, 0, None)
    ] * 2


@long
def test_planted_faults_are_found_and_shrunk(tiny_llama_dir, monkeypatch):
    def ends_early(request, max_model_len):
        return check_stop(request, min(max_model_len, request.num_prompt_tokens + 32))

    with arena(0, tiny_llama_dir) as engine:
        short = (Arrival(tuple(range(40)), 33, 0),)
        engine.run(short)
        with monkeypatch.context() as patch:
            patch.setattr("vllm.v1.core.sched.scheduler.check_stop", ends_early)
            with pytest.raises(AssertionError, match="gets 32 tokens, not 33"):
                engine.run(short)
        frees_a_page_too_many(monkeypatch)
        with pytest.raises(
            AssertionError, match=r"(?s)seeds 0, \d+: .*; scenario:\n  after"
        ) as failure:
            engine.scenarios(range(10))
    assert str(failure.value).count("\n  after") <= 3
