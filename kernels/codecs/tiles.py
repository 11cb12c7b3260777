"""What of a format kernels are compiled for, as one constant that they take."""

import os
from typing import Any


class Tiles:
    """The device's side of a format: functions that kernels call as `TILES.fold_columns` and so on,
    and constants.

    Kernels for other formats are other kernels to Triton's caches: they tell them apart by `repr`
    in memory and by `cache_key` on disk.

    Formats of whole channels (`core.formats.whole`) take the functions of `fold_columns`,
    `fold_rows` and `whole_store`, which know two kinds of numbers: as they are (no `encode`), and
    of up to 16 bits with one scale for each granule of K and of V, which is a `side_bytes` of 8.
    Any other format brings functions of its own.

    Args:
        fold_columns: takes archive tiles into a running softmax with queries in columns.
        fold_rows: the same with queries in rows.
        compact: encodes a head's granules into its pages.
        encode: for formats of whole channels, from a granule, fp32, K as `[32, channels]` and V as
            `[channels, 32]`, to what is stored and the scale, a number, that this has to be
            multiplied by. What is stored becomes the codec's dtype by a plain cast, so integers
            must be whole numbers here. None: numbers are stored as they are.
        unit: by how much stored numbers may exceed the model's. The sum of weights times scales
            times V is kept in units of it, within fp16.

    Attributes:
        SCALED: whether there are scales, two fp32 numbers per granule, of K and then of V.
        ASM: whether PTX may be used, which Triton's interpreter does not know.
    """

    def __init__(
        self,
        fold_columns: Any,
        fold_rows: Any,
        compact: Any,
        encode: Any = None,
        unit: float = 1.0,
    ) -> None:
        self.fold_columns, self.fold_rows, self.compact = fold_columns, fold_rows, compact
        self.encode, self.UNIT, self.SCALED = encode, unit, encode is not None
        self.ASM = os.environ.get("TRITON_INTERPRET") != "1"

    @property
    def cache_key(self) -> str:
        """Changes with the functions' code."""
        functions = (self.fold_columns, self.fold_rows, self.compact, self.encode)
        return f"{[getattr(one, 'cache_key', None) for one in functions]}, {self.UNIT}"

    def __repr__(self) -> str:
        functions = (self.fold_columns, self.fold_rows, self.compact, self.encode)
        names = [f"{one.__module__}.{one.__name__}" for one in functions if one is not None]
        return f"Tiles({names}, {self.UNIT})"
