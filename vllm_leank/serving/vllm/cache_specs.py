"""Tells vLLM which manager serves a cache spec of ours. For vLLM 0.32 and 0.33.

Goes when `KVCacheSpecRegistry.register` registers vLLM's own specs first.
"""


def register_spec(spec: type, manager: type) -> None:
    """Tell vLLM which manager serves a cache spec of ours; its layers form a group of their own.

    vLLM registers its own specs only while the registry is empty, so they must come first. Goes
    when `KVCacheSpecRegistry.register` sees to that itself.
    """
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)
