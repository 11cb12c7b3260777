"""Layers that keep a state of each request instead of K and V, or beside them: Mamba's, and
short convolutions. A state is as large for a long request as for a short one, and stays vLLM's.

A type of model is added here when tests run it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_leank.core.hf_config import Get, fields_of, required

STATES = ("conv", "linear_attention")
"""What transformers calls layers with a state alone, in `layer_types`."""


@dataclass(frozen=True)
class StateLayers:
    """Layers that keep a state of `state_bytes` for each request, on a tensor-parallel rank."""

    count: int
    state_bytes: int


def keeps_states(config: Any) -> bool:
    """Whether the config is of a type of model whose states leank knows."""
    return fields_of(config)("model_type") in _STATE_ITEMS


def count_states(config: Any, kinds: tuple[str, ...]) -> int:
    """Layers that keep a state, of a decoder with layers of these kinds."""
    if not keeps_states(config):
        return 0
    if fields_of(config)("model_type") == "falcon_h1":
        return len(kinds)  # every layer has attention and a state
    return sum(kind in STATES for kind in kinds)


def state_items(config: Any, tp_size: int) -> int:
    """Numbers in a layer's state on a tensor-parallel rank, as vLLM keeps it."""
    get = fields_of(config)
    return _STATE_ITEMS[str(get("model_type"))](get, tp_size)


def _short_conv(get: Get, tp_size: int) -> int:
    channels = get("conv_dim") or required(get, "hidden_size")
    return int(channels) // tp_size * (required(get, "conv_L_cache") - 1)


def _mamba2(get: Get, tp_size: int) -> int:
    inner = get("mamba_d_ssm") or required(get, "mamba_expand") * required(get, "hidden_size")
    groups, size = required(get, "mamba_n_groups"), required(get, "mamba_d_state")
    if groups % tp_size:
        groups = tp_size  # each rank has the group of its heads
    conv = (inner + 2 * groups * size) // tp_size * (required(get, "mamba_d_conv") - 1)
    return conv + inner // tp_size * size


_STATE_ITEMS: dict[str, Callable[[Get, int], int]] = {
    "lfm2": _short_conv,
    "granitemoehybrid": _mamba2,
    "falcon_h1": _mamba2,
}
