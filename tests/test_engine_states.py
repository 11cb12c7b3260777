"""Models with layers that keep states beside served ones: plain vLLM and the oracle agree."""

import os

import numpy as np
import pytest
from archive_definition import PACKED
from delta_nets_in_fp32 import use_fp32
from engines import engine
from gpu_engines import mean_error
from mask_samples import coded_mask, full_mask
from oracle import Oracle
from state_models import KINDS, MODELS, NATIVE_ROPE, STATE, save_state
from test_engine_answers import assert_same, long, long_but, prompts_of
from test_engine_sliding import LIMITS, PROMPTS, assert_as_defined, kept_mask
from test_gpu_mixed import save_in_bf16
from tiny_models import skip_without_torchvision
from vllm import LLM, SamplingParams

from vllm_leank.mask.file import save_mask
from vllm_leank.serving.scheduler.managers import ExactArchiveManager, ExactWindowManager

pytestmark = pytest.mark.engine

BLOCKS = 21

NOISE = {"nemotron_h": 5e-3}
"""What plain vLLM's log-probabilities differ from transformers' by, at most: its are 2.6e-3."""


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    return save_state("granitemoehybrid", tmp_path_factory.mktemp("granite"))


@pytest.mark.parametrize("model_type", long_but(MODELS, "granitemoehybrid", "qwen3_next"))
def test_architectures(model_type, tmp_path, monkeypatch):
    """A full mask answers like plain vLLM, in chunks; others as defined."""
    skip_without_torchvision(model_type)
    use_fp32(monkeypatch)
    model = save_state(model_type, tmp_path)
    args = LIMITS | (NATIVE_ROPE if model_type.startswith("lfm2") else {})
    with engine(model, **args) as plain:
        expected = plain.generate(PROMPTS, 40)
    with engine(model, full_mask(model), max_num_batched_tokens=100, **args) as leank:
        assert_same(leank.generate(PROMPTS, 40), expected, 1e-4)
    for mask in (kept_mask(model), coded_mask(model)):
        with engine(model, mask, **args) as leank:
            answers = leank.generate(PROMPTS, 40)
            assert_as_defined(model, mask, leank, PROMPTS, answers, NOISE.get(model_type, 1e-4))


@long
def test_delta_nets_in_bf16(tmp_path):
    """With vLLM's own kernels, where two chunkings of plain vLLM differ by up to 0.13 in a
    log-probability: leank is as near the model in fp32, or near the definition, as plain vLLM is.
    """
    model = save_in_bf16("qwen3_next", tmp_path)
    args, mask = LIMITS | {"dtype": "bfloat16"}, coded_mask(model)
    dense = Oracle(model, np.ones_like(mask.keep), 32, 64)
    packed = Oracle(model, mask, 32, 64, archive_format=PACKED)
    with engine(model, **args) as plain:
        noise = mean_error(plain.generate(PROMPTS, 40), PROMPTS, dense)
    with engine(model, full_mask(model), **args) as leank:
        assert mean_error(leank.generate(PROMPTS, 40), PROMPTS, dense) < 1.5 * noise
    with engine(model, mask, **args) as leank:
        answers = leank.generate(PROMPTS, 40)
    assert mean_error(answers, PROMPTS, packed) < 1.5 * noise
    assert mean_error(answers, PROMPTS, dense) > 2 * noise


@pytest.mark.parametrize("mask_of", [pytest.param(kept_mask, marks=long), coded_mask])
def test_archive_pages_that_fill_blocks_of_large_states(tmp_path, mask_of):
    """Of more tokens than where requests share prefixes."""
    model = save_state("granitemoehybrid", tmp_path, mamba_d_state=512)
    mask = mask_of(model)
    with engine(model, mask, max_num_batched_tokens=100, **LIMITS) as leank:
        plan = leank.plan
        assert plan.archive_block > plan.archive_format.blocks[-1]
        assert plan.archive_page_bytes > 0.95 * plan.block_bytes
        assert_as_defined(model, mask, leank, PROMPTS, leank.generate(PROMPTS, 40), 1e-4)


@pytest.mark.parametrize("mask_of", [pytest.param(kept_mask, marks=long), coded_mask])
def test_a_tight_pool_full_of_nan(granite, mask_of):
    """Chunks and preemption, where memory that nobody may read is NaN."""
    mask, prompts = mask_of(granite), prompts_of([150, 128, 9, 30, 31, 32])
    with engine(
        granite, mask, max_num_batched_tokens=100, max_model_len=256,
        num_gpu_blocks_override=BLOCKS,
    ) as leank:  # fmt: skip
        assert leank.plan.blocks_in_prefill(leank.window, 256, 100) < BLOCKS
        leank.poison(leank.block_pool.blocks)
        leank.poison_freed_blocks()
        preempted = leank.watch_preemptions()
        assert_as_defined(granite, mask, leank, prompts, leank.generate(prompts, 70))
        pool = leank.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert preempted


def test_what_requests_hold_is_what_is_planned(granite):
    """In prompts and answers, with vLLM's own groups of states."""
    (prompt,) = prompts_of([300])
    with engine(granite, kept_mask(granite), **LIMITS) as leank:
        plan, held = leank.plan, leank.watch_blocks_held()
        assert plan.states.count == KINDS.count(STATE)
        assert plan.window_block == 96
        block = leank.core.model_executor.driver_worker.model_runner.kv_cache_config
        assert {one.block_stride for one in block.kv_cache_tensors} == {plan.block_bytes}
        managers = leank.scheduler.kv_cache_manager.coordinator.single_type_managers
        # Of leank's blocks vLLM zeroes those of longer window pages.
        zeroed = {type(one): one.records_new_block_ids for one in managers}
        assert (zeroed[ExactArchiveManager], zeroed[ExactWindowManager]) == (False, True)
        leank.generate([prompt], 70)
    in_answer = max(blocks for tokens, blocks in held if tokens > 310)
    planned = max(plan.blocks_in_decode(leank.window, tokens) for tokens in range(311, 371))
    assert planned - 3 <= in_answer <= planned
    assert max(blocks for _, blocks in held) <= plan.blocks_in_prefill(leank.window, 370, 4096)


@pytest.mark.skipif(not os.environ.get("LEANK_PARALLEL"), reason="slow: set LEANK_PARALLEL=1")
def test_two_ranks_answer_like_one(granite, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    for mask in (kept_mask(granite), coded_mask(granite)):
        with engine(granite, mask, **LIMITS) as leank:
            expected = leank.generate(PROMPTS, 70)
        split = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
        with engine(granite, mask, **split, **LIMITS) as leank:
            assert_same(leank.generate(PROMPTS, 70), expected, 5e-3)


@long
def test_an_engine_in_a_process_of_its_own(granite, tmp_path, monkeypatch):
    """As servers have it: what plans the cache was spawned, and layers with kernels for states."""
    mask, path = kept_mask(granite), tmp_path / "mask.yaml"
    with engine(granite, mask, **LIMITS) as leank:
        expected = leank.generate(PROMPTS[:1], 20)[0][0]
    save_mask(mask, path)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    options = {"leank": {"mask": str(path), "sink": 32, "recent": 64}}
    llm = LLM(
        str(granite), dtype="float32", skip_tokenizer_init=True, enforce_eager=True,
        enable_prefix_caching=False, kv_cache_memory_bytes=1 << 26, seed=0, max_model_len=1024,
        attention_backend="leank", additional_config=options,
    )  # fmt: skip
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True, detokenize=False)
    (answer,) = llm.generate([{"prompt_token_ids": PROMPTS[0]}], params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    assert list(answer.outputs[0].token_ids) == expected
