"""Models with sliding layers beside those that leank serves: plain vLLM and the oracle agree."""

import os
from functools import cache

import pytest
import torch
from engines import engine
from mask_samples import coded_mask, full_mask, random_mask
from mixed_models import KINDS, MODELS, WINDOW, as_vllm_runs_it, save_mixed
from oracle import Oracle
from test_engine_answers import assert_same, long, long_but, prompts_of

pytestmark = pytest.mark.engine

LIMITS = {"max_model_len": 1024}
BLOCKS = 25
PROMPTS = prompts_of([300, 33])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a model, by its type."""
    return cache(lambda model_type: save_mixed(model_type, tmp_path_factory.mktemp(model_type)))


def kept_mask(model):
    return random_mask(model, [32, 0, 16, 64])


def assert_as_defined(model, mask, leank, prompts, answers, noise=1e-4):
    """Log-probabilities of answers are the oracle's, up to what the model's own code differs by."""
    form = leank.plan.archive_format
    oracle = Oracle(model, mask, 32, 64, archive_format=form)
    # Sums in another order may make another code of a number at the edge of two.
    tolerance = 5e-2 if mask.is_packed else noise
    for prompt, (tokens, logprobs) in zip(prompts, answers, strict=True):
        found = oracle.position_logprobs(prompt + tokens, exact_until=len(prompt))[-len(tokens) :]
        assert torch.tensor(logprobs) == pytest.approx(found, abs=tolerance)


def assert_served(model, loaded=None, **args):
    """A full mask answers like plain vLLM, chunked and with prefix hits; another as defined."""
    args |= LIMITS
    with engine(model, **args) as plain:
        expected = plain.generate(PROMPTS, 40)
    cached = {"enable_prefix_caching": True, "max_num_batched_tokens": 100}
    with engine(model, full_mask(model), **cached, **args) as leank:
        assert_same(leank.generate(PROMPTS, 40), expected, 1e-4)
        hits = leank.watch_hits()
        assert_same(leank.generate(PROMPTS, 40), expected, 1e-4)
        assert all(hits)
    mask = kept_mask(model)
    with engine(model, mask, **args) as leank:
        answers = leank.generate(PROMPTS, 40)
        assert_as_defined(loaded or as_vllm_runs_it(model), mask, leank, PROMPTS, answers)


def test_prompts_that_only_begin_alike_find_the_beginning(saved):
    """Sliding layers keep pages at the end of a beginning that was seen twice."""
    model = saved("gemma3_text")
    start, *tails = prompts_of([600, 150, 151, 152, 153])
    found = []
    for mask in (None, full_mask(model)):
        options = {"enable_prefix_caching": True, "max_num_batched_tokens": 256}
        with engine(model, mask, **options, **LIMITS) as one:
            hits = one.watch_hits()
            answers = [one.generate([start + tail], 4)[0] for tail in tails]
            found.append((hits, answers))
    (plain_hits, expected), (hits, answers) = found
    assert_same(answers, expected, 1e-4)
    for plain, ours in zip(plain_hits, hits, strict=True):
        assert (ours > 0) == (plain > 0)
    assert min(hits[2:]) > 500


@pytest.mark.parametrize("model_type", long_but(MODELS, "gemma3_text", "gpt_oss"))
def test_architectures(model_type, saved):
    assert_served(saved(model_type))


@pytest.mark.parametrize(
    ("model_type", "mask_of"),
    [
        pytest.param("gemma3_text", kept_mask, marks=long),
        ("gemma3_text", coded_mask),
        pytest.param("gpt_oss", coded_mask, marks=long),
    ],
)
def test_a_tight_pool_full_of_nan(saved, model_type, mask_of):
    """Chunks, preemption and prefix hits, where memory that nobody may read is NaN."""
    model = saved(model_type)
    mask, (document,) = mask_of(model), prompts_of([128], seed=1)
    tails = prompts_of([1, 40, 9], seed=2)
    prompts = [document + tail for tail in tails] + prompts_of([30, 31, 32], seed=3)
    with engine(
        model, mask, enable_prefix_caching=True, max_num_batched_tokens=100, max_model_len=256,
        num_gpu_blocks_override=BLOCKS,
    ) as leank:  # fmt: skip
        assert leank.plan.blocks_in_prefill(leank.window, 256, 100) < BLOCKS
        leank.poison(leank.block_pool.blocks)
        leank.poison_freed_blocks()
        hits, preempted = leank.watch_hits(), leank.watch_preemptions()
        answers = leank.generate(prompts, 70) + leank.generate(prompts[:2], 70)
        assert_as_defined(as_vllm_runs_it(model), mask, leank, prompts + prompts[:2], answers)
        pool = leank.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    # Hits are whole archive pages, and those of codes have 384 tokens.
    assert any(hits) or mask.is_packed
    assert preempted


def test_what_requests_hold_is_what_is_planned(saved):
    """In prompts and answers, with vLLM's own groups of sliding layers."""
    model, (prompt,) = saved("gemma3_text"), prompts_of([300])
    with engine(model, kept_mask(model), **LIMITS) as leank:
        plan, most = leank.plan, leank.watch_blocks_held()
        assert plan.sliding.count == KINDS.count("sliding_attention")
        assert plan.sliding.window == WINDOW
        leank.generate([prompt], 70)
    in_answer = [held for tokens, held in most if tokens > 310]
    planned = plan.blocks_in_decode(leank.window, 370)
    assert planned - 3 <= max(in_answer) <= planned
    assert max(held for _, held in most) <= plan.blocks_in_prefill(leank.window, 370, 4096)


@pytest.mark.skipif(not os.environ.get("LEANK_PARALLEL"), reason="slow: set LEANK_PARALLEL=1")
@pytest.mark.parametrize(
    ("model_type", "mask_of"),
    [("gemma3_text", kept_mask), ("gemma3_text", coded_mask), ("gpt_oss", kept_mask)],
)
def test_two_ranks_answer_like_one(saved, model_type, mask_of, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = saved(model_type)
    mask = mask_of(model)
    with engine(model, mask, **LIMITS) as leank:
        expected = leank.generate(PROMPTS, 70)
    split = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(model, mask, enable_prefix_caching=True, **split, **LIMITS) as leank:
        for _ in range(2):
            assert_same(leank.generate(PROMPTS, 70), expected, 5e-3)
