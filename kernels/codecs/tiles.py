"""What of a format kernels are compiled for, as one constant that they take."""

from typing import Any


class Tiles:
    """The device's side of a format, used in kernels as `TILES.encode` and so on.

    Kernels for other formats are other kernels to Triton's caches: they tell them apart by `repr`
    in memory and by `cache_key` on disk.

    The Triton kernels can do two kinds of formats: numbers as they are (`Tiles()`), and numbers of
    up to 16 bits with one scale for each granule of K and of V. The second kind has `side_bytes` 8
    in its `ArchiveFormat`. Anything else needs a change of the kernels that load tiles.

    Args:
        encode: device function from a granule, fp32, K as `[32, channels]` and V as
            `[channels, 32]`, to what is stored and the scale, a number, that this has to be
            multiplied by. What is stored becomes the codec's dtype by a plain cast, so integers
            must be whole numbers here. None: numbers are stored as they are.
        unit: by how much stored numbers may exceed the model's. The sum of weights times scales
            times V is kept in units of it, within fp16.

    Attributes:
        SCALED: whether there are scales, two fp32 numbers per granule, of K and then of V.
    """

    def __init__(self, encode: Any = None, unit: float = 1.0) -> None:
        self.encode, self.UNIT, self.SCALED = encode, unit, encode is not None

    @property
    def cache_key(self) -> str:
        """Changes with the function's code."""
        return f"{getattr(self.encode, 'cache_key', None)}, {self.UNIT}"

    def __repr__(self) -> str:
        return f"Tiles({getattr(self.encode, '__qualname__', None)}, {self.UNIT})"
