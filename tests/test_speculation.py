"""Speculative decoding: drafts are checked over the archive, and rejected ones leave no trace."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from speculation import NGRAM, answers

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def run():
    """Each engine has a process of its own: where vLLM's n-gram drafter has been imported (and
    with it llvmlite), vLLM 0.32 cannot start another one on CPU.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        yield lambda *arguments: pool.submit(answers, *arguments).result()


@pytest.fixture(scope="module")
def plain(run):
    results, seen, _ = run(None, {})
    assert not seen
    return results


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_num_batched_tokens": 256},
        {"num_gpu_blocks_override": 50, "enable_prefix_caching": True},
    ],
    ids=["chunked", "preempted"],
)
def test_tokens_are_those_without_speculation(run, plain, arguments):
    results, seen, preempted = run(NGRAM, arguments)
    assert min(seen["accepted"], seen["rejected"]) > 100
    assert seen["rolled back"] > 5
    assert bool(preempted) == ("num_gpu_blocks_override" in arguments)
    for (tokens, logprobs), (expected, expected_logprobs) in zip(results, plain, strict=True):
        assert tokens == expected
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-3)
