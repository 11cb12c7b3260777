"""What the engine holds in memory, and that it reads nothing else."""

import gc
import math
import weakref

import pytest
from engines import CACHE_BYTES, engine
from mask_samples import coded_mask, full_mask, random_mask
from test_engine_answers import (
    assert_same,
    kept_mask,
    long,
    prompts_of,
    tolerance_of,
)
from vllm import SamplingParams
from vllm.model_executor.layers.attention import Attention
from vllm.v1.worker.utils import clear_layer_kv_caches

from vllm_leank.core.options import Options
from vllm_leank.mask.settings import plan_settings

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "mask_of",
    [
        pytest.param(kept_mask, id="pruned", marks=long),
        pytest.param(coded_mask, id="codes"),
        pytest.param(lambda model: random_mask(model, [0]), id="all heads streaming", marks=long),
    ],
)
def test_memory_that_nobody_wrote_is_never_read(tiny_llama_dir, mask_of):
    """NaN in fresh pages, page tails, block 0, and in every block the moment it is freed."""
    prompts = prompts_of([1, 31, 64, 97, 300, 1000])
    mask = mask_of(tiny_llama_dir)
    with engine(tiny_llama_dir, mask, max_model_len=2048) as leank:
        expected = leank.generate(prompts, 100)
    with engine(tiny_llama_dir, mask, max_model_len=2048, max_num_batched_tokens=100) as leank:
        leank.memory.fill_(math.nan)
        freed = leank.poison_freed_blocks()
        assert_same(leank.generate(prompts, 100), expected)
        assert len(freed) > 60
        assert leank.memory[0].isnan().all(), "block 0 is nobody's, but was written"


def test_pages_go_when_vllm_drops_them(tiny_llama_dir):
    """As it does with the pool that it tries CUDA graphs with, whose memory it takes for free."""
    with engine(tiny_llama_dir, coded_mask(tiny_llama_dir), max_model_len=1024) as leank:
        leank.generate(prompts_of([300]), 4)
        context = leank.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        layers = [layer for layer in context.values() if isinstance(layer, Attention)]
        held = [weakref.ref(layer.impl._layer_cache(layer)) for layer in layers]
        assert all(one() for one in held)
        leank.core.model_executor.driver_worker.model_runner.kv_caches.clear()
        clear_layer_kv_caches(context.values())
        gc.collect()
        assert not any(one() for one in held)


@pytest.mark.parametrize(
    ("mask_of", "max_tokens", "short_prompts"),
    [
        (coded_mask, 100, 8),
        pytest.param(coded_mask, 300, 16, marks=long),
        pytest.param(kept_mask, 300, 16, marks=long),
    ],
)
def test_shared_prefixes_survive_preemption_in_poisoned_memory(
    tiny_llama_dir, mask_of, max_tokens, short_prompts
):
    """Prefix caching in a pool that is too small: hits, preemptions and NaN at once."""
    mask = mask_of(tiny_llama_dir)
    page = plan_settings(mask, Options(), 4).plan.archive_block
    documents = prompts_of([max(256, page + 16), max(192, page)])
    tails = prompts_of([5, 70, 33, 64, 1, 100, 20, 40], seed=7)
    prompts = [documents[index % 2] + tail for index, tail in enumerate(tails)]
    # Prompts that end with a page: a resumed request could find the whole of its own.
    prompts += [documents[1]] * 4
    # Short ones, which are let in together and then grow.
    prompts = prompts_of(range(10, 10 + 2 * short_prompts, 2), seed=8) + prompts
    limits = {"max_model_len": 1024, "max_num_seqs": 16}
    with engine(tiny_llama_dir, mask, **limits) as leank:
        expected = leank.generate(prompts, max_tokens)
        one_request = leank.plan.blocks_in_prefill(leank.window, 1024)
    with engine(
        tiny_llama_dir,
        mask,
        num_gpu_blocks_override=one_request + 2,
        enable_prefix_caching=True,
        max_num_batched_tokens=150,
        **limits,
    ) as leank:
        free = leank.block_pool.get_num_free_blocks()
        leank.poison_new_blocks()
        preempted = leank.watch_preemptions()
        assert_same(leank.generate(prompts, max_tokens), expected, tolerance_of(mask))
        assert sum(outputs > 0 for outputs in preempted) >= 2, preempted
        assert leank.block_pool.get_num_free_blocks() == free


def step_until(leank, request_id, tokens):
    """Step the engine until the request has computed this many tokens; its state."""
    llm_engine = leank.llm.llm_engine
    request = next(r for key, r in leank.scheduler.requests.items() if key.startswith(request_id))
    while request.num_computed_tokens < tokens:
        llm_engine.step()
    return request


@pytest.mark.parametrize(
    ("mask", "length"),
    [
        (coded_mask, 2048),
        *(pytest.param(one, 8192, marks=long) for one in (full_mask, kept_mask, coded_mask)),
    ],
)
def test_a_request_holds_what_the_layout_says(tiny_llama_dir, mask, length):
    """All of the prompt in prefill, archive and window after; nothing at the end."""
    (prompt,) = prompts_of([length])
    with engine(tiny_llama_dir, mask(tiny_llama_dir), max_model_len=length + 64) as leank:
        pool, plan, window = leank.block_pool, leank.plan, leank.window
        free = pool.get_num_free_blocks()
        params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True, detokenize=False)
        leank.llm.llm_engine.add_request("one", {"prompt_token_ids": prompt}, params)
        leank.llm.llm_engine.step()
        step_until(leank, "one", length)
        assert free - pool.get_num_free_blocks() == plan.blocks_in_prefill(window, length)
        for generated in (1, 31, 32, 33, 50):
            step_until(leank, "one", length + generated)
            held = free - pool.get_num_free_blocks()
            # The pool is asked for a step's pages before what that step frees is known.
            assert held - plan.blocks_in_decode(window, length + generated) in (0, 1)
        assert free - pool.get_num_free_blocks() < plan.blocks_in_prefill(window, length) / 1.3
        while leank.llm.llm_engine.has_unfinished_requests():
            leank.llm.llm_engine.step()
        assert pool.get_num_free_blocks() == free


@pytest.mark.parametrize("mask_of", [pytest.param(kept_mask, marks=long), coded_mask])
def test_capacity_is_what_the_layout_says(tiny_llama_dir, mask_of):
    mask = mask_of(tiny_llama_dir)
    with engine(tiny_llama_dir, mask) as leank:
        config = leank.core.scheduler.kv_cache_config
        assert len(config.kv_cache_groups) == 2
        assert config.num_blocks == CACHE_BYTES // leank.plan.block_bytes
        assert leank.memory.shape[1] * 4 == leank.plan.block_bytes


@pytest.mark.parametrize("mask_of", [pytest.param(kept_mask, marks=long), coded_mask])
def test_the_smallest_pool_that_starts_serves_the_longest_requests(tiny_llama_dir, mask_of):
    """vLLM refuses to start with less than the longest request needs, so none waits forever."""
    mask, limits = mask_of(tiny_llama_dir), {"max_model_len": 512}
    with engine(tiny_llama_dir, mask, **limits) as leank:
        needed = leank.plan.blocks_in_prefill(leank.window, 512) + 1  # block 0 is nobody's
    too_small = engine(tiny_llama_dir, mask, num_gpu_blocks_override=needed - 1, **limits)
    with pytest.raises(ValueError, match="To serve at least one request"), too_small:
        pass
    prompts = prompts_of([511, 500, 3], seed=4)
    with engine(tiny_llama_dir, mask, num_gpu_blocks_override=needed, **limits) as leank:
        answers = leank.generate(prompts, 600)
    assert [len(tokens) for tokens, _ in answers] == [1, 12, 509]


@pytest.mark.parametrize("mask_of", [pytest.param(kept_mask, marks=long), coded_mask])
def test_questions_about_one_document_hold_its_archive_once(tiny_llama_dir, mask_of):
    """All at once, one of them aborted and its memory NaN: answers stay those of each alone."""
    (document,) = prompts_of([640], seed=5)
    prompts = [document + tail for tail in prompts_of([1, 40, 70, 33, 90, 7], seed=6)]
    mask = mask_of(tiny_llama_dir)
    with engine(tiny_llama_dir, mask, max_model_len=1024) as leank:
        expected = leank.generate(prompts, 100)
    params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True, detokenize=False)
    with engine(tiny_llama_dir, mask, max_model_len=1024, enable_prefix_caching=True) as leank:
        leank.poison_freed_blocks()
        llm_engine, manager = leank.llm.llm_engine, leank.scheduler.kv_cache_manager
        for name, prompt in enumerate([prompts[0], *prompts]):
            llm_engine.add_request(f"{name}:", {"prompt_token_ids": prompt}, params)
        step_until(leank, "6:", 720)
        tables = [manager.get_blocks(name).blocks[0] for name in leank.scheduler.requests]
        block = leank.plan.archive_block
        shared = leank.window.archived(641) // block
        assert shared
        for page in range(shared):
            assert len({table[page].block_id for table in tables}) == 1
        private = [one.block_id for table in tables for one in table[shared:]]
        assert len(set(private)) >= len(tables)
        llm_engine.abort_request(["0:"])
        answers = {}
        while llm_engine.has_unfinished_requests():
            for output in llm_engine.step():
                answers[output.request_id] = list(output.outputs[0].token_ids)
        assert [answers[f"{n}:"] for n in range(1, 7)] == [tokens for tokens, _ in expected]
        assert leank.block_pool.get_num_free_blocks() == leank.block_pool.num_gpu_blocks - 1
