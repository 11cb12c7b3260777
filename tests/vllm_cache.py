"""vLLM's own cache planning and block managers over leank's specs, without an engine."""

from types import SimpleNamespace

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheLayout,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm_planning import MODEL_CONFIG, get_kv_cache_configs

from vllm_leank.core.pages import LEAST_BLOCK
from vllm_leank.core.plan import CachePlan
from vllm_leank.core.window import Window
from vllm_leank.serving.scheduler.specs import archive_spec, window_spec

DTYPES = {2: torch.bfloat16, 4: torch.float32}

LONGEST = 1 << 20
"""Tokens of the longest request, more than any test's."""

IN_FLIGHT = 1024
"""Tokens that steps planned and not yet run hold at most."""


def vllm_config(max_model_len: int) -> VllmConfig:
    """A config without a model, with the page order that leank's backends ask for."""
    config = VllmConfig()
    config.cache_config.kv_cache_layout = KVCacheLayout.BLHNC.name
    config.model_config = SimpleNamespace(
        max_model_len=max_model_len, original_max_model_len=max_model_len, **MODEL_CONFIG
    )
    return config


def cache_specs(
    plan: CachePlan, window: Window, rank: int = 0, stage: int | None = None
) -> dict[str, KVCacheSpec]:
    """Specs of the layers of one rank and stage (None: of all stages), in the order in which vLLM
    finds them: a stage's archive comes before its attention layers.
    """
    base = FullAttentionSpec(
        block_size=16,
        num_kv_heads=len(plan.rank_heads(rank)),
        head_size=plan.head_dim,
        dtype=DTYPES[plan.itemsize],
    )
    window_pages = window_spec(base, plan, window, IN_FLIGHT)
    specs: dict[str, KVCacheSpec] = {}
    if plan.sliding is not None:
        sliding = SlidingWindowSpec(
            block_size=LEAST_BLOCK,
            num_kv_heads=base.num_kv_heads,
            head_size=base.head_size,
            dtype=base.dtype,
            sliding_window=plan.sliding.window,
        )
        specs |= {f"model.layers.{100 + i}.attn": sliding for i in range(plan.sliding.count)}
    if plan.states is not None:
        state = MambaSpec(
            block_size=LONGEST, shapes=((plan.states.state_bytes,),), dtypes=(torch.uint8,)
        )
        specs |= {f"model.layers.{200 + i}.mixer": state for i in range(plan.states.count)}
    for index, (first, count) in enumerate(zip(plan.first_layers, plan.stages, strict=True)):
        if stage in (None, index):
            specs[f"layers.{first}.archive"] = archive_spec(plan, window, base.dtype)
            for layer in range(first, first + count):
                specs[f"model.layers.{layer}.attn"] = window_pages
    return specs


def cache_configs(
    plan: CachePlan, window: Window, memory: int, max_model_len: int
) -> list[KVCacheConfig]:
    """What vLLM plans for `memory` bytes on every worker: one config per stage and rank."""
    specs = [
        cache_specs(plan, window, rank, stage)
        for stage in range(len(plan.stages))
        for rank in range(plan.tp_size)
    ]
    return get_kv_cache_configs(vllm_config(max_model_len), specs, [memory] * len(specs))
