"""RoPE pairs of channels, and what masks and energies look like by frequency.

Channels i and i + R/2 turn together, where R is the number of channels that RoPE turns (all, or the
first ones of a partial RoPE): the layout of Llama, Qwen, Mistral and most others. Pair 0 turns
fastest, by one radian per token; pair i once every `2 pi theta^(2i/R)` tokens, before any scaling.
"""

import numpy as np
import numpy.typing as npt

from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import UserError

NO_ROPE = "the layers that the mask is for have no RoPE, so their channels have no frequencies"

FloatArray = npt.NDArray[np.float64]


def channel_pairs(geometry: Geometry) -> npt.NDArray[np.int64]:
    """The two channels of each pair, fastest pair first, `[P, 2]`.

    Raises:
        UserError: no layer that a mask is for has RoPE.
    """
    if geometry.rope_theta is None:
        raise UserError(NO_ROPE)
    partial = (geometry.rope_scaling or {}).get("partial_rotary_factor") or 1
    pairs = int(geometry.head_dim * partial) // 2
    return np.arange(pairs)[:, None] + np.array([0, pairs])


def wavelengths(geometry: Geometry) -> FloatArray:
    """Tokens in which each pair turns once, before scaling, `[P]`.

    Raises:
        UserError: no layer that a mask is for has RoPE.
    """
    count = len(channel_pairs(geometry))
    assert geometry.rope_theta is not None
    turns: FloatArray = 2 * np.pi * geometry.rope_theta ** (np.arange(count) / count)
    return turns


def pair_shares(keep: npt.NDArray[np.bool_ | np.uint8], geometry: Geometry) -> FloatArray:
    """Share of each pair's channels that a mask `[L, H, D]` keeps, over all heads of layers with
    RoPE, `[P]`.

    Of bits it is their mean.
    """
    turned = keep[geometry.has_rope]
    shares: FloatArray = turned[..., channel_pairs(geometry)].mean(axis=(0, 1, 3))
    return shares


def outlier_pairs(shares: FloatArray) -> list[int]:
    """Pairs that are kept much more often than those beside them.

    By half as much again, and by 10 points, as each of the two pairs on either side.
    """
    found = []
    for pair, share in enumerate(shares):
        beside = np.concatenate([shares[max(0, pair - 2) : pair], shares[pair + 1 : pair + 3]])
        if len(beside) and share >= max(1.5 * beside.max(), beside.max() + 0.1):
            found.append(pair)
    return found


def high_frequency_share(energy: FloatArray, geometry: Geometry) -> FloatArray:
    """Share of each head's energy in the faster half of its pairs: `[L, H, D]` to `[L, H]`.

    `energy` is `E[q_c^2] * E[k_c^2]` per channel. LeanK (arXiv 2508.02215) proposes a head's
    high-frequency share as a sign, without training, of heads that matter little; the formula is
    ours. What turns fast tells near tokens apart and blurs over far ones. Channels without RoPE
    count as slow, so heads of layers without it have share 0. A head without energy has share 1.
    """
    pairs = channel_pairs(geometry)
    fast = energy[..., pairs[: len(pairs) // 2].ravel()].sum(axis=-1)
    fast[np.logical_not(geometry.has_rope)] = 0
    total = energy.sum(axis=-1)
    return np.divide(fast, total, out=np.ones_like(fast), where=total > 0)
