"""vLLM's own cache planning and block managers over leank's specs, without an engine."""

from types import SimpleNamespace

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheLayout, KVCacheSpec
from vllm_planning import MODEL_CONFIG, get_kv_cache_configs

from vllm_leank.core.layout import CachePlan
from vllm_leank.core.window import Window
from vllm_leank.serving.backend import layer_backend
from vllm_leank.serving.scheduler.specs import window_spec

DTYPES = {2: torch.bfloat16, 4: torch.float32}

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


def cache_specs(plan: CachePlan, window: Window, rank: int = 0) -> dict[str, KVCacheSpec]:
    """Specs of all layers of one rank, in the order in which vLLM finds them: the window modules
    are registered after all attention layers.
    """
    base = FullAttentionSpec(
        block_size=16,
        num_kv_heads=len(plan.rank_heads(rank)),
        head_size=plan.head_dim,
        dtype=DTYPES[plan.itemsize],
    )
    archives = {
        f"model.layers.{index}.attn": layer_backend(plan.layer(index, rank), window).customize_spec(
            base
        )
        for index in range(len(plan.kept))
    }
    windows = {
        f"{name}.window": window_spec(
            archive, window, archive_block=plan.archive_block, in_flight=IN_FLIGHT
        )
        for name, archive in archives.items()
    }
    return archives | windows


def cache_configs(
    plan: CachePlan, window: Window, memory: int, max_model_len: int
) -> list[KVCacheConfig]:
    """What vLLM plans for `memory` bytes on every tensor-parallel rank, one config per rank."""
    specs = [cache_specs(plan, window, rank) for rank in range(plan.tp_size)]
    return get_kv_cache_configs(vllm_config(max_model_len), specs, [memory] * plan.tp_size)
