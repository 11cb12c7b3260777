"""What of a format kernels are compiled for, as one constant that they take."""

import os
from typing import Any


class Tiles:
    """The device's side of a format: functions that kernels call as `TILES.fold_columns` and so on,
    and constants.

    Kernels for other formats are other kernels to Triton's caches: they tell them apart by `repr`
    in memory and by `cache_key` on disk.

    Formats of whole channels (`core.formats.whole`) may take the functions of `fold_columns`,
    `fold_rows`, `whole_store` and `whole_lead`, which store and read numbers by plain casts. Any
    other format brings functions of its own.

    Args:
        fold_columns: takes archive tiles into a running softmax with queries in columns.
        fold_rows: the same with queries in rows.
        compact: encodes a head's granules into its pages.
        unpack: decodes a tile of a head's tokens into plain K and V, so that many queries read it
            at once. None: tiles are read as fast as they lie.
        lead: a module whose `lead_query` and `lead_scores` score tokens by the lead of their K.
            None: queries cannot select what they read.
        encode: of `whole_store`: what numbers of the model become before the cast to the codec's
            dtype. None: they stay as they are.

    Attributes:
        ASM: whether PTX may be used, which Triton's interpreter does not know.
    """

    def __init__(
        self,
        fold_columns: Any,
        fold_rows: Any,
        compact: Any,
        encode: Any = None,
        unpack: Any = None,
        lead: Any = None,
    ) -> None:
        self.fold_columns, self.fold_rows, self.compact = fold_columns, fold_rows, compact
        self.encode, self.unpack = encode, unpack
        self.lead_query = getattr(lead, "lead_query", None)
        self.lead_scores = getattr(lead, "lead_scores", None)
        self.ASM = os.environ.get("TRITON_INTERPRET") != "1"

    @property
    def cache_key(self) -> str:
        """Changes with the functions' code."""
        keys = [getattr(one, "cache_key", None) for one in self._functions]
        return str(keys)

    def __repr__(self) -> str:
        names = [f"{one.__module__}.{one.__name__}" for one in self._functions if one is not None]
        return f"Tiles({names})"

    @property
    def _functions(self) -> tuple[Any, ...]:
        parts = self.fold_columns, self.fold_rows, self.compact
        return *parts, self.encode, self.unpack, self.lead_query, self.lead_scores
