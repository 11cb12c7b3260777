"""Speculative decoding: drafts are checked over the archive, and rejected ones leave no trace."""

from importlib.util import find_spec

import pytest
from speculation import DRAFT, NGRAM, SUFFIX, answers, own_process
from test_engine_answers import assert_same

pytestmark = pytest.mark.engine

DRAFTERS = [
    pytest.param(NGRAM, id="text"),
    pytest.param(DRAFT, id="model"),
    pytest.param(
        SUFFIX,
        id="suffix",
        marks=pytest.mark.skipif(
            find_spec("arctic_inference") is None, reason="needs arctic-inference 0.1.1"
        ),
    ),
]


@pytest.fixture(scope="module")
def run():
    """Give `answers`, in this process where vLLM lets it be: another one costs ten seconds."""
    with own_process() as elsewhere:

        def run(speculation, arguments):
            if speculation in (None, DRAFT):
                return answers(speculation, arguments)
            return elsewhere(answers, speculation, arguments)

        yield run


@pytest.fixture(scope="module")
def plain(run):
    results, seen, _ = run(None, {})
    assert not seen
    return results


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"max_num_batched_tokens": 256},
        {"num_gpu_blocks_override": 50, "enable_prefix_caching": True},
    ],
    ids=["chunked", "preempted"],
)
def test_tokens_are_those_without_speculation(run, plain, drafter, arguments):
    results, seen, preempted = run(drafter, arguments)
    assert min(seen["accepted"], seen["rejected"]) > 100
    assert seen["rolled back"] > 5
    assert bool(preempted) == ("num_gpu_blocks_override" in arguments)
    assert_same(results, plain, 1e-3)


PRUNED = {"prefill": "pruned", "max_num_batched_tokens": 256, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def plain_pruned(run):
    results, _, _ = run(None, PRUNED)
    return results


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_where_prompts_are_read_pruned(run, plain_pruned, drafter):
    results, seen, _ = run(drafter, PRUNED | {"enable_prefix_caching": True})
    assert min(seen["accepted"], seen["rejected"]) > 100
    assert_same(results, plain_pruned, 1e-3)
