"""Whole heads, those whose energy lies in slow RoPE pairs."""

import numpy as np
import numpy.typing as npt

from vllm_leank.core.geometry import Geometry
from vllm_leank.mask.rope_pairs import high_frequency_share


def slow_heads(
    energy: npt.NDArray[np.float64], geometry: Geometry, ratio: float
) -> npt.NDArray[np.bool_]:
    """Heads with the lowest high-frequency share keep every channel, others none."""
    shares = high_frequency_share(energy, geometry)
    keep = np.zeros(energy.shape, dtype=bool)
    best = np.argsort(shares, axis=None, kind="stable")[: round((1 - ratio) * shares.size)]
    keep.reshape(-1, energy.shape[-1])[best] = True
    return keep
