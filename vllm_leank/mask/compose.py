"""Joins masks: intersection, union, streaming heads and layers that stay dense.

Heads must keep a multiple of `align` channels, which an intersection or union seldom gives. Such
heads are filled up with more channels (an intersection with those of the first mask), slowest RoPE
pairs first: these are kept most in learned masks. Where a mask has other bits than 16 and 0 all
are joined channel by channel, without filling up: what gives heads that no page could hold is
refused.
"""

import datetime
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vllm_leank.core.bounded import read_bounded
from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import UserError
from vllm_leank.mask.bits import BitsArray, bits_of_keep
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.mask import BITS_ALIGN, Mask
from vllm_leank.mask.rope_pairs import channel_pairs
from vllm_leank.mask.statistics import Statistics
from vllm_leank.mask.tsv import parse_tsv
from vllm_leank.version import __version__

BoolArray = npt.NDArray[np.bool_]
By = Literal["intersection", "union"]

MAX_BYTES = 1 << 20
"""Largest list of heads that is read."""


def compose(
    masks: Sequence[Mask],
    by: By = "intersection",
    *,
    streaming: Path | None = None,
    streaming_share: float | None = None,
    dense_layers: Sequence[int] = (),
    model_id: str | None = None,
) -> Mask:
    """One mask of several for the same model.

    In this order: channels that all masks keep (or any of them, by union), or of each channel the
    fewest (or most) bits; nothing in heads that `streaming` names (`read_streaming_heads`);
    everything in `dense_layers`. The result has the first mask's model id, the first statistics
    that any mask has, the least `longest_prompt` and the largest sink, recent and (by common
    multiple) align of all. A single mask that stays as it is keeps its evaluation.

    Raises:
        UserError: the masks are of different geometry, a part does not fit them, or their bits
            together are no mask.
    """
    first = masks[0]
    for mask in masks[1:]:
        if mismatch := first.geometry.mismatch(mask.geometry):
            raise UserError(f"{_name(first)} and {_name(mask)} do not fit each other: {mismatch}")
    joined = (_joined_keep if all(map(_only_prunes, masks)) else _joined_bits)(masks, by)

    provenance: dict[str, Any] = {"method": "compose"}
    if len(masks) > 1:
        provenance["by"] = by
    provenance["masks"] = [
        {
            "file": None if mask.path is None else mask.path.name,
            "method": mask.provenance["method"],
            "sha256": mask.sha256,
        }
        for mask in masks
    ]
    if joined.statistics is not None and len(masks) > 1:
        provenance["statistics"] = "of the first mask that has them"
    if (longest := _longest_prompt(masks)) is not None:
        provenance["longest_prompt"] = longest
    if streaming is not None:
        data = read_bounded(streaming, MAX_BYTES, "lists of heads")
        heads = _streaming_heads(data, streaming, first.geometry, streaming_share)
        joined.k_bits[heads] = joined.v_bits[heads] = 0
        provenance["streaming"] = {
            "file": streaming.name,
            "sha256": hashlib.sha256(data).hexdigest(),
            "heads": int(heads.sum()),
        }
    for layer in dense_layers:
        row = row_of(layer, first.geometry)
        joined.k_bits[row] = joined.v_bits[row] = 16
    if dense_layers:
        provenance["dense_layers"] = sorted(dense_layers)
    provenance["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    provenance["vllm_leank"] = __version__
    try:
        return Mask(
            model_id or first.model,
            first.geometry,
            joined.align,
            max(mask.sink for mask in masks),
            max(mask.recent for mask in masks),
            provenance,
            joined.k_bits,
            joined.v_bits,
            joined.statistics,
            first.evaluation if _is_copy(joined, masks, model_id) else None,
        )
    except MaskError as error:
        if error.loc[:1] in (("layers",), ("profiles",)):
            raise UserError(
                f"these masks cannot be joined so: {error}\nCalibrate one of as many bits as you "
                "want instead: leank mask calibrate MODEL --bits B"
            ) from error
        raise


def row_of(layer: int, geometry: Geometry) -> int:
    """Where a mask has a layer of the model.

    Raises:
        UserError: there is no such layer, or it is none that leank serves.
    """
    if not 0 <= layer < geometry.num_layers:
        raise UserError(f"there is no layer {layer}: the model has {geometry.num_layers}")
    if layer not in geometry.layers:
        served = ", ".join(map(str, geometry.layers))
        raise UserError(f"layer {layer} has no full attention; masks are for layers {served}")
    return geometry.layers.index(layer)


def read_streaming_heads(path: Path, geometry: Geometry, share: float | None = None) -> BoolArray:
    """Heads that see only sink and recent tokens, bool `[L, H]`.

    The file is what DuoAttention (arXiv 2410.10819) writes: a line per layer with a number from 0
    to 1 per KV head, separated by tabs; streaming heads have low ones. They are those below 0.5
    or, with `share`, this share of all heads, lowest first.

    Raises:
        UserError: the file cannot be read or does not fit the model, or `share` is out of range.
    """
    data = read_bounded(path, MAX_BYTES, "lists of heads")
    return _streaming_heads(data, path, geometry, share)


def _streaming_heads(data: bytes, path: Path, geometry: Geometry, share: float | None) -> BoolArray:
    """What `read_streaming_heads` gives, of a file's bytes."""
    if share is not None and not 0 <= share <= 1:
        raise UserError(f"streaming share is {share}; it must lie between 0 and 1")
    try:
        values = parse_tsv(data)
    except ValueError as error:
        raise UserError(f"{path}: no table of numbers separated by tabs: {error}") from error
    shape = geometry.shape[:2]
    if values.shape != shape:
        raise UserError(f"{path}: has {values.shape} numbers; layers and KV heads are {shape}")
    if not ((values >= 0) & (values <= 1)).all():
        raise UserError(f"{path}: has values outside 0..1")
    return values < 0.5 if share is None else lowest_heads(values, share)


def lowest_heads(values: npt.NDArray[np.float64], share: float) -> BoolArray:
    """The heads with the lowest of `values` `[L, H]`, this share of all to the nearest head; of
    equal ones those of the first layers.
    """
    lowest = np.argsort(values, axis=None, kind="stable")[: round(share * values.size)]
    heads = np.zeros(values.size, dtype=bool)
    heads[lowest] = True
    return heads.reshape(values.shape)


@dataclass
class _Joined:
    """What several masks give together."""

    align: int
    k_bits: BitsArray
    v_bits: BitsArray
    statistics: Statistics | None = None


def _joined_keep(masks: Sequence[Mask], by: By) -> _Joined:
    """Channels that are kept whole or not at all, filled up to multiples of `align`."""
    first = masks[0]
    align = math.lcm(*(mask.align for mask in masks))
    if first.geometry.head_dim % align:
        raise UserError(
            f"aligns {[mask.align for mask in masks]} have no common multiple that "
            f"divides head_dim {first.geometry.head_dim}"
        )
    keeps = np.stack([mask.keep for mask in masks])
    if by == "intersection":
        keep = _filled(np.logical_and.reduce(keeps), first.keep, align, first.geometry)
    else:
        every = np.ones_like(first.keep)
        keep = _filled(np.logical_or.reduce(keeps), every, align, first.geometry)
    statistics = _first_statistics(masks)
    return _Joined(align if statistics is None else BITS_ALIGN, *bits_of_keep(keep), statistics)


def _joined_bits(masks: Sequence[Mask], by: By) -> _Joined:
    """The fewest or most bits of each channel, with the first statistics there are."""
    reduce = np.minimum.reduce if by == "intersection" else np.maximum.reduce
    return _Joined(
        BITS_ALIGN,
        reduce([mask.k_bits for mask in masks]),
        reduce([mask.v_bits for mask in masks]),
        _first_statistics(masks),
    )


def _only_prunes(mask: Mask) -> bool:
    """Whether the mask is what kept K channels say: V of the heads that keep any, in 16 bits."""
    keep = bits_of_keep(mask.keep)
    return all(
        bool((bits == kept).all())
        for bits, kept in zip((mask.k_bits, mask.v_bits), keep, strict=True)
    )


def _first_statistics(masks: Sequence[Mask]) -> Statistics | None:
    return next((mask.statistics for mask in masks if mask.statistics is not None), None)


def _longest_prompt(masks: Sequence[Mask]) -> int | None:
    """Tokens up to which all masks hold, as far as they say: statistics are one's, bits all's."""
    told = [mask.provenance.get("longest_prompt") for mask in masks]
    return min((tokens for tokens in told if type(tokens) is int), default=None)


def _is_copy(joined: _Joined, masks: Sequence[Mask], model_id: str | None) -> bool:
    """Whether what is written is the one mask that was read, so that its evaluation holds."""
    (first, *others), by_name = masks, model_id or masks[0].model
    unchanged = (joined.k_bits == first.k_bits).all() and (joined.v_bits == first.v_bits).all()
    return not others and by_name == first.model and bool(unchanged)


def _filled(keep: BoolArray, allowed: BoolArray, align: int, geometry: Geometry) -> BoolArray:
    """`keep` with as many more of the `allowed` channels as its heads lack to multiples of `align`.

    Both are `[L, H, D]`. Channels that are not turned come first, then those of slow RoPE pairs,
    and of a pair the first one.
    """
    channels = keep.shape[-1]
    slowness = np.full(channels, channels)
    if geometry.rope_theta is not None:
        pairs = channel_pairs(geometry)
        slowness[pairs] = np.arange(len(pairs))[:, None]
    order = np.argsort(-(keep * 2 + allowed) * 2 * channels - slowness, axis=-1, kind="stable")
    counts = keep.sum(axis=-1, keepdims=True)
    wanted = -(-counts // align) * align
    filled = np.zeros_like(keep)
    np.put_along_axis(filled, order, np.arange(keep.shape[-1]) < wanted, axis=-1)
    return filled


def _name(mask: Mask) -> str:
    return mask.model if mask.path is None else str(mask.path)
