"""Channels of heads as hex digits: how `leank-mask/1` writes what is kept."""

import re

import numpy as np
import numpy.typing as npt

from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import shortened
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.strict_yaml import Loc


def hex_of_keep(keep: npt.NDArray[np.bool_]) -> list[list[str]]:
    """A text per layer and head of bool `[L, H, D]`, a digit for four channels."""
    return [[head.tobytes().hex() for head in heads] for heads in np.packbits(keep, axis=-1)]


def keep_of_hex(layers: list[list[str]], geometry: Geometry) -> npt.NDArray[np.bool_]:
    """Channels from hex, bool `[L, H, D]`; channel 0 is the top bit of the first digit."""
    check_layers(len(layers), geometry)
    digits = geometry.head_dim // 4
    rows = []
    for i, heads in enumerate(layers):
        check_count(len(heads), geometry.num_kv_heads, "heads", "num_kv_heads", ("layers", i))
        for j, text in enumerate(heads):
            loc = ("layers", i, j)
            if len(text) != digits:
                raise MaskError(
                    f"has {len(text)} hex digits; head_dim {geometry.head_dim} takes {digits}",
                    loc=loc,
                )
            # bytes.fromhex alone would also take blanks.
            if not re.fullmatch("[0-9a-fA-F]+", text):
                raise MaskError(f"{shortened(text)} has other characters than 0-9, a-f", loc=loc)
            rows.append(np.frombuffer(bytes.fromhex(text), np.uint8))
    shape = geometry.shape
    return np.unpackbits(np.stack(rows), axis=-1).astype(bool).reshape(shape)


def check_layers(found: int, geometry: Geometry) -> None:
    """As many layers as the geometry says."""
    field = "num_layers" if geometry.served_layers is None else "number of served_layers"
    check_count(found, len(geometry.layers), "layers", field, ("layers",))


def check_count(found: int, wanted: int, what: str, field: str, loc: Loc) -> None:
    """As many layers or heads as the geometry says."""
    if found != wanted:
        raise MaskError(f"has {found} {what}; geometry.{field} is {wanted}", loc=loc)
