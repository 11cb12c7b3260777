"""What every mask must be like, whether it is read from a file or made in memory.

Each check raises a `MaskError` with the key where the fault would stand in a file.
"""

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.layers import MAX_LAYERS
from vllm_leank.core.pages import MAX_HEAD_DIM
from vllm_leank.core.window import GRANULE, MOST
from vllm_leank.errors import shortened
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.names import ID_LETTERS, MOST_LETTERS
from vllm_leank.mask.strict_yaml import Loc

MAX_HEADS = 4096
"""More KV heads than any model has, as `MAX_LAYERS`."""

_NAME = f"[{ID_LETTERS}]{{1,{MOST_LETTERS}}}"
_MODEL_ID = re.compile(f"{_NAME}(/{_NAME})?")
_UNWRITABLE = re.compile("[\ud800-\udfff]")


def check_model_id(model: str) -> None:
    """A hub id, so that it can be looked up."""
    if not _MODEL_ID.fullmatch(model):
        raise MaskError(
            f"{shortened(model)} is no model id; write `org/name`, of letters, digits and . _ -",
            loc=("model",),
        )


def check_geometry(geometry: Geometry) -> None:
    """Shapes that kernels and pages are made for, and RoPE settings that can be written."""
    for name, most in (("num_layers", MAX_LAYERS), ("num_kv_heads", MAX_HEADS)):
        if not 1 <= (found := getattr(geometry, name)) <= most:
            raise MaskError(
                f"is {found}; it must be at least 1, and at most {most}",
                loc=("geometry", name),
            )
    layers = geometry.layers
    if list(layers) != sorted(set(layers) & set(range(geometry.num_layers))) or not layers:
        raise MaskError(
            f"is {list(layers)}; it must name some of the {geometry.num_layers} layers, ascending",
            loc=("geometry", "served_layers"),
        )
    without = geometry.layers_without_rope
    if list(without) != sorted(set(without) & set(layers)):
        raise MaskError(
            f"is {list(without)}; it must name some of the layers that the mask is for, ascending",
            loc=("geometry", "layers_without_rope"),
        )
    if geometry.head_dim % 32 or not 32 <= geometry.head_dim <= MAX_HEAD_DIM:
        raise MaskError(
            f"is {geometry.head_dim}; it must be a multiple of 32, up to {MAX_HEAD_DIM}",
            loc=("geometry", "head_dim"),
        )
    if geometry.rope_theta is not None and not 0 < geometry.rope_theta < float("inf"):
        raise MaskError(
            f"is {geometry.rope_theta}; it must be positive", loc=("geometry", "rope_theta")
        )
    if geometry.rope_scaling is not None:
        check_plain(geometry.rope_scaling, ("geometry", "rope_scaling"))
        if not isinstance(geometry.rope_scaling["rope_type"], str):
            raise MaskError("must be text", loc=("geometry", "rope_scaling", "rope_type"))
        partial = geometry.rope_scaling.get("partial_rotary_factor")
        if partial is not None and not (type(partial) in (int, float) and 0 < partial <= 1):
            raise MaskError(
                f"is {shortened(str(partial))}; it must be a number above 0, and at most 1",
                loc=("geometry", "rope_scaling", "partial_rotary_factor"),
            )


def check_align(align: int, head_dim: int) -> None:
    """A number of channels by which the heads of this model can be cut."""
    if align < 16 or align % 16 or head_dim % align:
        raise MaskError(
            f"is {align}; it must be a multiple of 16 that divides head_dim {head_dim}",
            loc=("align",),
        )


def check_window(sink: int, recent: int) -> None:
    """Dense tokens that the window rule can have."""
    if sink < 0:
        raise MaskError(f"is {sink}; it must be at least 0", loc=("window", "sink"))
    for name, tokens in (("sink", sink), ("recent", recent)):
        if tokens > MOST:
            reason = f"is {shortened(tokens)}; it must be at most {MOST}"
            raise MaskError(reason, loc=("window", name))
    if recent < GRANULE:
        raise MaskError(
            f"is {recent}; it must be at least {GRANULE}, the step of compaction",
            loc=("window", "recent"),
        )


def check_provenance(provenance: dict[str, Any]) -> None:
    """Plain values, among them how the mask was made."""
    check_plain(provenance, ("provenance",))
    method = provenance.get("method")
    if not isinstance(method, str) or not method:
        raise MaskError("must name how the mask was made", loc=("provenance", "method"))


def check_keep(keep: npt.NDArray[np.bool_], shape: tuple[int, int, int]) -> None:
    """Channels, bool `[L, H, D]`."""
    if keep.dtype != np.bool_ or keep.shape != shape:
        raise MaskError(f"keep must be bool of shape {shape}, not {keep.dtype} {keep.shape}")


def check_counts(counts: npt.NDArray[np.int64], align: int) -> None:
    """Kept channels of heads, `[L, H]`, as `leank-mask/1` allows them."""
    if (odd := np.argwhere(counts % align)).size:
        i, j = (int(index) for index in odd[0])
        raise MaskError(
            f"keeps {counts[i, j]} channels, which is no multiple of align {align}",
            loc=("layers", i, j),
        )


def check_plain(value: Any, loc: Loc) -> None:
    """Refuse what would not read back as it was written."""
    if len(loc) > 16:
        raise MaskError("nested too deep", loc=loc[:2])
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise MaskError(f"key {key!r} must be text", loc=loc)
            check_plain(key, loc)
            check_plain(item, (*loc, key))
    elif type(value) is list:
        for index, item in enumerate(value):
            check_plain(item, (*loc, index))
    elif type(value) is str:
        if _UNWRITABLE.search(value):
            raise MaskError(
                f"{shortened(value)} has characters that text files cannot hold", loc=loc
            )
    elif value is not None and type(value) not in (bool, int, float):
        raise MaskError(f"{type(value).__name__} is not a plain value", loc=loc)
    elif type(value) is float and not np.isfinite(value):
        raise MaskError(f"is {value}; numbers must be finite", loc=loc)
