"""vLLM's cache planner, which vLLM 0.33 moved to a module of its own and split in two."""

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

try:
    from vllm.v1.core import kv_cache_planning as planner
except ImportError:  # vLLM 0.32
    from vllm.v1.core import kv_cache_utils as planner

get_kv_cache_groups = planner.get_kv_cache_groups

MODEL_CONFIG = {"supports_kv_cache_grouping": False}
"""What the planner of 0.33 asks of a model's config besides the lengths."""


def get_kv_cache_configs(
    config: VllmConfig, specs: list[dict[str, KVCacheSpec]], memory: list[int]
) -> list[KVCacheConfig]:
    """One config per worker from its layers' specs and its bytes, as an engine plans them."""
    if not hasattr(planner, "get_global_kv_cache_groups"):  # vLLM 0.32
        return planner.get_kv_cache_configs(config, specs, memory)
    groups = planner.get_global_kv_cache_groups(config, specs)
    return planner.get_kv_cache_configs(config, specs, memory, groups)
