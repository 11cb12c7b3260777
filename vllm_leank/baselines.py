"""Other ways to choose channels, to compare masks with. Quality only.

Each gives bool `[L, H, D]` and prunes a share of `ratio`. Those that need no alignment have none:
they are as good as they can be. What is compared besides: `calibrate`, learned masks, and ThinK
(`simulate.ThinK`), which chooses anew for every prompt.
"""

import numpy as np
import numpy.typing as npt

from vllm_leank.core.geometry import Geometry
from vllm_leank.mask.rope_pairs import high_frequency_share
from vllm_leank.mask.select_channels import select_channels

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


def random_channels(shape: tuple[int, int, int], ratio: float, align: int, seed: int) -> BoolArray:
    """Channels by chance, budgets of heads as well: in groups of `align`, as masks have them."""
    return select_channels(np.random.default_rng(seed).random(shape), ratio, align)


def uniform_energy(energy: FloatArray, ratio: float) -> BoolArray:
    """The same number of channels in every head, those with the most energy `[L, H, D]`."""
    count = round((1 - ratio) * energy.shape[-1])
    order = np.argsort(-energy, axis=-1, kind="stable")
    keep = np.zeros(energy.shape, dtype=bool)
    np.put_along_axis(keep, order[..., :count], True, axis=-1)
    return keep


def global_energy(energy: FloatArray, ratio: float, align: int) -> BoolArray:
    """The channels with the most energy `[L, H, D]` of all heads together, in groups of `align`."""
    return select_channels(energy, ratio, align)


def slow_heads(energy: FloatArray, geometry: Geometry, ratio: float) -> BoolArray:
    """Whole heads: those with the lowest high-frequency share keep every channel, others none."""
    shares = high_frequency_share(energy, geometry)
    keep = np.zeros(energy.shape, dtype=bool)
    best = np.argsort(shares, axis=None, kind="stable")[: round((1 - ratio) * shares.size)]
    keep.reshape(-1, energy.shape[-1])[best] = True
    return keep
