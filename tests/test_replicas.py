"""Data-parallel replicas: each engine has a cache of its own, and all answer alike."""

import asyncio

import pytest
from prometheus_client import REGISTRY
from recall.demo import MODEL
from recall.tasks import make_sample
from test_parallel import every_split
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.plugins import load_general_plugins
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.prometheus import unregister_vllm_metrics

from vllm_leank.serving.settings import load_settings

pytestmark = [pytest.mark.engine, every_split]

CACHE_BYTES = 1 << 26


async def served(samples):
    """Answers to each sample from both replicas, and what the metrics say at their end."""
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            str(MODEL),
            attention_backend="leank",
            data_parallel_size=2,
            dtype="float32",
            max_model_len=1200,
            max_num_seqs=4,
            enforce_eager=True,
            kv_cache_memory_bytes=CACHE_BYTES,
            skip_tokenizer_init=True,
        )
    )

    async def answer(number, sample):
        params = SamplingParams(
            max_tokens=len(sample.answer_token_ids), temperature=0, detokenize=False
        )
        prompt = {"prompt_token_ids": sample.prompt_token_ids}
        rank = number % 2
        async for output in llm.generate(prompt, params, str(number), data_parallel_rank=rank):
            last = output
        return list(last.outputs[0].token_ids)

    try:
        twice = enumerate([sample for sample in samples for _ in range(2)])
        answers = await asyncio.gather(*(answer(*one) for one in twice))
        metrics = {
            (name, engine): REGISTRY.get_sample_value(
                f"vllm:leank_{name}", {"model_name": str(MODEL), "engine": engine}
            )
            for name in ("cache_bytes", "compacted_tokens_total")
            for engine in "01"
        }
        return answers, metrics, load_settings(llm.vllm_config).plan
    finally:
        llm.shutdown()
        unregister_vllm_metrics()


def test_two_replicas_answer_alike_and_count_their_own_caches(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    # One core each is not there to be bound to on every machine.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    load_general_plugins()
    samples = [make_sample(task, 700, 0) for task in ("single", "multikey")]
    answers, metrics, plan = asyncio.run(served(samples))
    assert answers == [list(one.answer_token_ids) for one in samples for _ in range(2)]
    for engine in "01":
        pool = CACHE_BYTES // plan.block_bytes * plan.block_bytes
        assert metrics["cache_bytes", engine] == pool
        assert metrics["compacted_tokens_total", engine] > 0
