"""Bits without a calibration: alike in all heads, for planning before there is a mask."""

import numpy as np

from vllm_leank.core.formats.packed import CODE_CLASSES
from vllm_leank.core.geometry import Geometry
from vllm_leank.mask.bits import check_bits_asked
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.statistics import Statistics
from vllm_leank.offline.allocate import (
    Allocation,
    by_variance,
    class_widths,
    side_costs,
    spread,
)


def even_bits(layers: int, heads: int, head_dim: int, bits: float) -> Allocation:
    """So many bits per element in the mean, where all channels are worth the same.

    Heads can have only some numbers of bits; where `bits` lies between two of them, heads take one
    or the other in turn.
    """
    widths = class_widths(head_dim)
    of_side = widths @ np.array(CODE_CLASSES)
    equal = np.ones((1, head_dim))
    loss = side_costs(by_variance(equal), widths)[0]
    sizes = np.add.outer(of_side, of_side)
    losses = np.add.outer(loss, loss)
    # Of 96 channels not all can have 8 bits.
    wanted = min(bits * 2 * head_dim, int(sizes.max()))
    low, high = int(sizes[sizes <= wanted].max()), int(sizes[sizes >= wanted].min())
    share = (wanted - low) / (high - low) if high > low else 0.0
    turns = np.floor(np.arange(layers * heads + 1) * share)
    picks = [_best(losses, sizes == (high if more else low)) for more in np.diff(turns)]
    k_bits, v_bits = (
        spread(equal.repeat(len(picks), axis=0), widths[[pick[side] for pick in picks]])
        for side in range(2)
    )
    shape = (layers, heads, head_dim)
    return Allocation(k_bits.reshape(shape), v_bits.reshape(shape))


def _best(losses: np.ndarray, allowed: np.ndarray) -> tuple[int, int]:
    """Widths of K and V that lose least."""
    k, v = np.unravel_index(np.where(allowed, losses, np.inf).argmin(), losses.shape)
    return int(k), int(v)


def even_mask(model: str, geometry: Geometry, bits: float) -> Mask:
    """A mask of so many bits per element, alike in all heads: for what it stores, not for serving.

    Raises:
        UserError: `bits` is out of range.
    """
    check_bits_asked(bits)
    chosen = even_bits(*geometry.shape, bits)
    return Mask.from_bits(
        chosen.k_bits,
        chosen.v_bits,
        geometry,
        model=model,
        provenance={"method": "plan"},
        statistics=Statistics(*[np.ones(geometry.shape, np.float16)] * 4),
    )
