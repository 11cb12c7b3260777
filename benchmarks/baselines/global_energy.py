"""The channels with the most energy of all heads together."""

import numpy as np
import numpy.typing as npt

from vllm_leank.mask.select_channels import select_channels


def global_energy(
    energy: npt.NDArray[np.float64], ratio: float, align: int
) -> npt.NDArray[np.bool_]:
    """The channels with the most energy `[L, H, D]` of all heads together, in groups of `align`."""
    return select_channels(energy, ratio, align)
