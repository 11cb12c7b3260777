"""Class widths of a head: how many channels of K and of V far tokens keep, by their bits."""

from collections.abc import Sequence
from dataclasses import dataclass

CLASSES = (16, 8, 4, 2)
"""Bits of a stored channel, most first. Channels of 0 bits are the rest of the head."""


@dataclass(frozen=True, order=True)
class Profile:
    """Numbers of channels of 16, 8, 4 and 2 bits in K and in V; the rest of a head has 0 bits.

    Heads of equal profiles have equal pages and share compiled kernels. 16 bits stand for the
    model's own dtype.
    """

    k16: int = 0
    k8: int = 0
    k4: int = 0
    k2: int = 0
    v16: int = 0
    v8: int = 0
    v4: int = 0
    v2: int = 0

    @property
    def k(self) -> tuple[int, int, int, int]:
        """Channels of K by `CLASSES`."""
        return self.k16, self.k8, self.k4, self.k2

    @property
    def v(self) -> tuple[int, int, int, int]:
        """Channels of V by `CLASSES`."""
        return self.v16, self.v8, self.v4, self.v2

    @property
    def kept(self) -> int:
        """Channels of K that are stored."""
        return sum(self.k)

    @property
    def v_kept(self) -> int:
        """Channels of V that are stored."""
        return sum(self.v)

    @property
    def stores(self) -> bool:
        """Whether anything of far tokens is stored. A head without does not see them."""
        return bool(self.kept or self.v_kept)

    def __str__(self) -> str:
        return f"K {_widths(self.k)}, V {_widths(self.v)}" if self.stores else "nothing"


Profiles = tuple[tuple[Profile, ...], ...]
"""Those of a model, `[num_layers][num_kv_heads]`."""


def whole_heads(kept: Sequence[Sequence[int]], head_dim: int) -> Profiles:
    """Profiles of heads that keep so many K channels in 16 bits, and V if they keep any."""
    return tuple(
        tuple(Profile(k16=int(count), v16=head_dim if count else 0) for count in layer)
        for layer in kept
    )


def _widths(counts: Sequence[int]) -> str:
    parts = [f"{n} x {bits}" for bits, n in zip(CLASSES, counts, strict=True) if n]
    return " + ".join(parts) or "0"
