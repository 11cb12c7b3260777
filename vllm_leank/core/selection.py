"""How many far tokens a query reads, where it does not read them all.

Far tokens are read in segments of 64. A query reads the lead of all far tokens' K, which are the
channels with most bits and about a quarter of the bytes, and then the best segments alone, the same
for all query heads of a KV head. After Quest (arXiv 2406.10774), which keeps a minimum and a
maximum of each channel beside the pages, and chooses by these.
"""

import math
from dataclasses import dataclass
from typing import Any

from vllm_leank.core.window import GRANULE, MOST
from vllm_leank.errors import shortened

SEGMENT = 64
"""Tokens that are selected together; segment i has those from 64 * i on."""

FEWEST_TOKENS = 256
"""A number of tokens may not be smaller."""

LEAST_TOKENS = 2048
"""Far tokens that a query reads at least where a share is given, if there are as many: a share of a
short context is too little to answer from, and saves nothing."""

DENSE_LAYERS = 2
"""First layers of a model, which read all far tokens: there attention is spread evenly (Quest)."""

SHARE_UNITS = 1 << 16
"""A share is told to kernels in this many units, so that device and host round alike."""


def check_pages(pages: float) -> float:
    """The number itself, if it can be the option `pages`.

    Raises:
        ValueError: it cannot; the message says what is allowed.
    """
    if isinstance(pages, int) and pages < FEWEST_TOKENS:
        raise ValueError(
            f"pages is {pages}, but must be a share of far tokens, such as 0.1, or a whole number "
            f"of tokens, at least {FEWEST_TOKENS}"
        )
    if isinstance(pages, int) and pages > MOST:
        raise ValueError(f"pages is {shortened(pages)}, but must be at most {MOST} tokens")
    if not pages > 0 or (isinstance(pages, float) and pages > 1):
        raise ValueError(
            f"pages is {pages}, but must be a share of far tokens above 0 and up to 1.0, or a "
            f"whole number of tokens, at least {FEWEST_TOKENS}"
        )
    return pages


def whole_or_share(pages: float | None) -> float | None:
    """What a number means that came as a float: above 1 it counts tokens, which are whole. None is
    as it was.
    """
    if pages is None or not math.isfinite(pages):
        return pages
    return int(pages) if pages > 1 and pages == int(pages) else pages


@dataclass(frozen=True)
class Selection:
    """How many segments a query reads.

    Attributes:
        share: of all far segments, in units of 1 / `SHARE_UNITS`.
        least: segments, if there are as many.
    """

    share: int
    least: int

    @classmethod
    def of(cls, pages: float) -> "Selection | None":
        """Of the option `pages`: a share, or a number of tokens. None where all are read."""
        if isinstance(pages, int):
            return cls(0, -(-pages // SEGMENT))
        share = math.ceil(pages * SHARE_UNITS)
        return None if share >= SHARE_UNITS else cls(share, LEAST_TOKENS // SEGMENT)

    def __str__(self) -> str:
        """In words."""
        tokens = f"{self.least * SEGMENT:,} tokens"
        if self.share:
            tokens = f"{self.share / SHARE_UNITS:.1%} of them, at least {tokens}"
        return (
            f"answers read the best far tokens alone, {tokens}; the first {DENSE_LAYERS} layers "
            "read all"
        )

    def count(self, segments: Any) -> Any:
        """Of so many far segments, how many are read; takes and returns an int or an int tensor."""
        wanted = -(-segments * self.share // SHARE_UNITS)
        wanted = wanted + (self.least - wanted) * (wanted < self.least)
        return wanted + (segments - wanted) * (wanted > segments)


def unparted(selection: Selection | None) -> int:
    """Tokens that no archive page may part: pages have multiples of them."""
    return GRANULE if selection is None else SEGMENT


def selection_of(selection: Selection | None, layer: int) -> Selection | None:
    """That of a layer, one of those that are served: the first ones read all."""
    return selection if layer >= DENSE_LAYERS else None
