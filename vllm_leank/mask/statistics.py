"""What is known of every channel without storing it: mean and scale of K and V."""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from vllm_leank.mask.errors import MaskError

HalfArray = npt.NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and scale of each channel over far tokens, float16 `[L, H, D]`, read-only.

    K is meant as attention reads it, after RoPE: one mean for all positions, which is small where
    a channel turns fast. A scale is what steps of codes are counted in, and positive: the standard
    deviation of what is left when the mean is taken off, or what codes lose least with.

    Raises:
        MaskError: other types or shapes, or values that are not finite or no scale.
    """

    k_mean: HalfArray
    k_scale: HalfArray
    v_mean: HalfArray
    v_scale: HalfArray

    def __post_init__(self) -> None:
        for name in STATISTICS:
            values = np.array(getattr(self, name))
            values.setflags(write=False)
            object.__setattr__(self, name, values)
            if values.dtype != np.float16 or values.ndim != 3 or values.shape != self.shape:
                raise MaskError(
                    f"{name} must be float16 of shape [layers, KV heads, head_dim], "
                    f"not {values.dtype} {values.shape}"
                )
            faults = ~np.isfinite(values)
            if name.endswith("_scale"):
                faults |= values <= 0
            if faults.any():
                i, j, channel = (int(index) for index in np.argwhere(faults)[0])
                kind = "a positive number" if name.endswith("_scale") else "finite"
                raise MaskError(
                    f"is {values[i, j, channel]} for channel {channel}; it must be {kind}",
                    loc=("layers", i, j, name),
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """`(layers, KV heads, head_dim)`."""
        return self.k_mean.shape

    def same_as(self, other: "Statistics") -> bool:
        """Whether all values are equal."""
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in STATISTICS)


STATISTICS = tuple(field.name for field in fields(Statistics))
"""Names of the arrays, as they stand in mask files."""
