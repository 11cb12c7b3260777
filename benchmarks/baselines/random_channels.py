"""Channels by chance: what any method must beat."""

import numpy as np
import numpy.typing as npt

from vllm_leank.mask.select_channels import select_channels


def random_channels(
    shape: tuple[int, int, int], ratio: float, align: int, seed: int
) -> npt.NDArray[np.bool_]:
    """Channels by chance, budgets of heads as well: in groups of `align`, as masks have them."""
    return select_channels(np.random.default_rng(seed).random(shape), ratio, align)
