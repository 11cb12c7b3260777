"""The channels with the most energy of each head, as many in every head."""

import numpy as np
import numpy.typing as npt


def uniform_energy(energy: npt.NDArray[np.float64], ratio: float) -> npt.NDArray[np.bool_]:
    """The same number of channels in every head, those with the most energy `[L, H, D]`."""
    count = round((1 - ratio) * energy.shape[-1])
    order = np.argsort(-energy, axis=-1, kind="stable")
    keep = np.zeros(energy.shape, dtype=bool)
    np.put_along_axis(keep, order[..., :count], True, axis=-1)
    return keep
