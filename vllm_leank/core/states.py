"""Layers that keep a state of each request instead of K and V, or beside them: Mamba's, gated delta
nets, and short convolutions. A state is as large for a long request as for a short one, and stays
vLLM's.

A type of model is added here when tests run it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_leank.core.hf_config import Get, fields_of, required

STATES = ("conv", "linear_attention")
"""What transformers calls layers with a state alone, in `layer_types`."""

STATELESS = ("mlp", "moe")
"""The same of layers that keep nothing, in models with states."""


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


def state_bytes(config: Any, itemsize: int, tp_size: int) -> int:
    """Bytes of a layer's state on a tensor-parallel rank, as vLLM keeps it: of numbers of
    `itemsize` bytes, where the config does not ask for others.
    """
    get = fields_of(config)
    model_type = str(get("model_type"))
    conv, recurrent = _STATE_ITEMS[model_type](get, tp_size)
    asked = get(_DTYPE_FIELDS[model_type]) if model_type in _DTYPE_FIELDS else None
    return conv * itemsize + recurrent * _ITEMSIZES.get(str(asked), itemsize)


def _short_conv(get: Get, tp_size: int) -> tuple[int, int]:
    channels = get("conv_dim") or required(get, "hidden_size")
    return int(channels) // tp_size * (required(get, "conv_L_cache") - 1), 0


def _mamba2(get: Get, tp_size: int) -> tuple[int, int]:
    inner = get("mamba_d_ssm") or required(get, "mamba_expand") * required(get, "hidden_size")
    groups, size = required(get, "mamba_n_groups"), required(get, "mamba_d_state")
    return _of_mamba2(int(inner), groups, size, required(get, "mamba_d_conv"), tp_size)


def _nemotron(get: Get, tp_size: int) -> tuple[int, int]:
    inner = required(get, "mamba_num_heads") * required(get, "mamba_head_dim")
    groups, size = required(get, "n_groups"), required(get, "ssm_state_size")
    return _of_mamba2(inner, groups, size, required(get, "conv_kernel"), tp_size)


def _of_mamba2(inner: int, groups: int, size: int, kernel: int, tp_size: int) -> tuple[int, int]:
    if groups % tp_size:
        groups = tp_size  # each rank has the group of its heads
    conv = (inner + 2 * groups * size) // tp_size * (kernel - 1)
    return conv, inner // tp_size * size


def _gated_delta(get: Get, tp_size: int) -> tuple[int, int]:
    size = required(get, "linear_key_head_dim")
    keys = required(get, "linear_num_key_heads") * size
    values = required(get, "linear_num_value_heads") * required(get, "linear_value_head_dim")
    conv = (2 * keys + values) // tp_size * (required(get, "linear_conv_kernel_dim") - 1)
    return conv, values // tp_size * size


_STATE_ITEMS: dict[str, Callable[[Get, int], tuple[int, int]]] = {
    "lfm2": _short_conv,
    "lfm2_moe": _short_conv,
    "nemotron_h": _nemotron,
    "granitemoehybrid": _mamba2,
    "falcon_h1": _mamba2,
    "qwen3_next": _gated_delta,
    "qwen3_5_text": _gated_delta,
    "qwen3_5_moe_text": _gated_delta,
}
"""Numbers in a layer's state on a rank: of its convolution, and of what goes on from token to
token."""

_DTYPE_FIELDS = {
    "nemotron_h": "mamba_ssm_cache_dtype",
    "qwen3_5_text": "mamba_ssm_dtype",
    "qwen3_5_moe_text": "mamba_ssm_dtype",
}
"""Where the config says of what dtype the latter are; else the model's."""

_ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
