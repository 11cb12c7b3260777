"""Where every byte of a layer's pages lies: the heads of an archive page, and the window page.

Archive page of one layer (`archive_block` tokens): the part of each KV head that stores anything,
one behind the other, with the fields that the format gives it. Parts of a `WholeChannels` format:
kept K channels as chunks `[archive_block, width]`, then V transposed, `[head_dim, archive_block]`.
Those of `Packed`: see there.

Window page of one layer: `[num_kv_heads, window_block, 2 * head_dim]`, K then V in the last
dimension.

Nothing else in the project computes where a head begins. Sizes are in bytes; offsets in elements,
but for those of side data, which are in bytes.
"""

import math
from dataclasses import dataclass
from functools import cache, cached_property

from vllm_leank.core.formats import NATIVE, ArchiveFormat
from vllm_leank.core.formats.whole import CHUNK_WIDTHS
from vllm_leank.core.head_part import HeadPart
from vllm_leank.core.profile import Profile
from vllm_leank.core.window import GRANULE

LEAST_BLOCK = GRANULE
"""Tokens of the shortest page: a window page's, where the plan has no longer ones, and those of
sliding layers."""

MAX_HEAD_DIM = CHUNK_WIDTHS[0]
"""Most channels of a head: more than the widest chunk has no layout."""

TOKEN_BYTES_UNIT = 16
"""A layer has a multiple of this many bytes per token in an archive page. Pages have multiples of
32 tokens, so each layer begins at a multiple of 512 bytes: wide loads are aligned, and rows of up
to 256 elements of 2 bytes, or 512 of 1 byte, divide its part."""


@dataclass(frozen=True)
class CacheLayout:
    """Archive and window pages of one layer on one rank.

    Attributes:
        profiles: class widths of each KV head, such as the format takes.
        head_dim: channels of a head.
        itemsize: bytes of an element of a window page.
        archive_block: tokens of an archive page.
        archive_format: how far tokens are stored.
        window_block: tokens of a window page, whole granules.
        variants: profiles that kernels are compiled for: those of all heads of the model that store
            anything, so that layers share kernels. By default this layer's, ascending.

    Raises:
        ValueError: a head has too many channels, a profile that the format cannot store, or one
            that is not among `variants`.
    """

    profiles: tuple[Profile, ...]
    head_dim: int
    itemsize: int
    archive_block: int
    archive_format: ArchiveFormat = NATIVE
    variants: tuple[Profile, ...] = ()
    window_block: int = LEAST_BLOCK

    def __post_init__(self) -> None:
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"{self.head_dim} channels of a head are more than {MAX_HEAD_DIM}")
        if self.window_block < GRANULE or self.window_block % GRANULE:
            raise ValueError(
                f"window pages have {self.window_block} tokens, no multiple of {GRANULE}"
            )
        found = {profile for profile in self.profiles if profile.stores}
        if not self.variants:
            object.__setattr__(self, "variants", tuple(sorted(found)))
        for profile in sorted(found):
            if not self.archive_format.takes(profile):
                raise ValueError(f"no {self.archive_format.archive} can hold {profile}")
            if profile not in self.variants:
                known = "; ".join(map(str, self.variants))
                raise ValueError(f"heads store {profile}, not only {known}")

    @property
    def kept(self) -> tuple[int, ...]:
        """Stored K channels of each KV head."""
        return tuple(profile.kept for profile in self.profiles)

    @cached_property
    def heads(self) -> tuple[HeadPart | None, ...]:
        """Each KV head's part of the archive page; None for one that stores nothing."""
        form, block = self.archive_format, self.archive_block
        parts: list[HeadPart | None] = []
        offset = 0
        for profile in self.profiles:
            if not profile.stores:
                parts.append(None)
                continue
            parts.append(form.head_part(profile, block, self.itemsize, offset))
            offset += form.token_bytes(profile, self.itemsize) * block
        return tuple(parts)

    @property
    def archive_itemsize(self) -> int:
        """Bytes of an element of an archive page."""
        return self.archive_format.itemsize(self.itemsize)

    @property
    def archive_page_bytes(self) -> int:
        """Bytes of the layer in an archive page."""
        token = archive_token_bytes(self.profiles, self.itemsize, self.archive_format)
        return token * self.archive_block

    @property
    def window_page_bytes(self) -> int:
        """Size of a window page."""
        token = window_token_bytes(len(self.profiles), self.head_dim, self.itemsize)
        return token * self.window_block


@cache
def archive_token_bytes(
    profiles: tuple[Profile, ...], itemsize: int, archive_format: ArchiveFormat = NATIVE
) -> int:
    """Bytes of one archived token of one layer, in whole units."""
    heads = (archive_format.token_bytes(profile, itemsize) for profile in profiles)
    return math.ceil(sum(heads) / TOKEN_BYTES_UNIT) * TOKEN_BYTES_UNIT


def window_token_bytes(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one dense token of one layer."""
    return num_kv_heads * 2 * head_dim * itemsize


def pages(tokens: int, block: int) -> int:
    """Pages of `block` tokens that hold `tokens` tokens."""
    return -(-tokens // block)
