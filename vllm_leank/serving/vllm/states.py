"""States of layers beside leank's pages. For vLLM 0.32 and 0.33.

Goes when `initialize_mamba_ssu_backend` and the runner look inside `UniformTypeKVCacheSpecs`, and
when `_align_hybrid_block_size` leaves pages alone that need not be equal.
"""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

from vllm_leank.serving.vllm.backend_name import is_selected


def is_state(layer: Any) -> bool:
    """Whether a layer of vLLM's keeps a state of each request instead of K and V."""
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    return isinstance(layer, MambaBase)


def state_bytes(vllm_config: "VllmConfig") -> int:
    """Bytes of a layer's state on a tensor-parallel rank, in the dtypes that flags ask for."""
    from math import prod

    from vllm.model_executor.models import ModelRegistry

    model = vllm_config.model_config
    cls, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    shapes = cls.get_mamba_state_shape_from_config(vllm_config)
    dtypes = cls.get_mamba_state_dtype_from_config(vllm_config)
    return sum(prod(one) * dtype.itemsize for one, dtype in zip(shapes, dtypes, strict=True))


def hook_states() -> None:
    """Have states lie in blocks beside leank's pages as they are, in groups that vLLM knows for
    states.

    vLLM would pad each to a page of attention as long as it takes. And it wraps the spec of each
    group, and what prepares kernels for states does not look inside.
    """
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import MambaSpec

    try:
        from vllm.v1.core import kv_cache_planning as planner
    except ImportError:  # vLLM 0.32
        from vllm.v1.core import kv_cache_utils as planner

    if hasattr(planner, "_leank_hooked"):
        return
    platform = type(current_platform)
    align = platform._align_hybrid_block_size.__func__
    packed = planner._get_packed_kv_cache_groups

    @functools.wraps(align)
    def align_hybrid_block_size(cls: Any, vllm_config: "VllmConfig", backend: Any) -> None:
        if not is_selected(vllm_config):
            align(cls, vllm_config, backend)

    @functools.wraps(packed)
    def packed_groups(vllm_config: "VllmConfig", kv_cache_spec: dict[str, Any]) -> Any:
        groups = packed(vllm_config, kv_cache_spec)
        if groups is not None and is_selected(vllm_config):
            for group in groups:
                specs = {kv_cache_spec[name] for name in group.layer_names}
                if len(specs) == 1 and isinstance(spec := specs.pop(), MambaSpec):
                    group.kv_cache_spec = spec
        return groups

    platform._align_hybrid_block_size = classmethod(align_hybrid_block_size)
    planner._get_packed_kv_cache_groups = packed_groups
    planner._leank_hooked = True
