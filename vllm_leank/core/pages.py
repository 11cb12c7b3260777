"""Where every byte of a layer's pages lies: heads within a page, chunks within a head.

Archive page of one layer (`archive_block` tokens), per KV head in order: the kept K channels as
chunks of the widths that add up to their number, each a power of two, at least 16 and widest first
(112 = 64 + 32 + 16), each chunk `[archive_block, width]` contiguous; then V transposed,
`[head_dim, archive_block]`. A head that keeps no channel has neither K nor V there. Behind all
heads lies what the format keeps beside them, per head and granule.

Window page of one layer: `[num_kv_heads, 32, 2 * head_dim]`, K then V in the last dimension.

Nothing else in the project computes an offset within a page. Sizes are in bytes; offsets in
elements, but for those of side data, which are in bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vllm_leank.core.formats import NATIVE, ArchiveFormat
from vllm_leank.core.window import GRANULE

WINDOW_BLOCK = GRANULE
"""Tokens of a window page."""

CHUNK_WIDTHS = (256, 128, 64, 32, 16)
"""Widths of K chunks, widest first; the last is the finest alignment of a mask. A head has those of
the binary digits of the number of channels that it keeps."""

MAX_HEAD_DIM = CHUNK_WIDTHS[0]
"""Most channels of a head: more than the widest chunk has no layout."""

TOKEN_BYTES_UNIT = 16
"""A layer has a multiple of this many bytes per token in an archive page. Pages have multiples of
32 tokens, so each layer begins at a multiple of 512 bytes: wide loads are aligned, and rows of up
to 256 elements of 2 bytes, or 512 of 1 byte, divide its part."""


@dataclass(frozen=True)
class KChunk:
    """Columns of one head's kept K channels that lie together.

    Attributes:
        offset: first element within the page; token i of the page has its row of the chunk at
            `offset + i * width`.
        width: columns.
        first: index, among the head's kept channels, of the chunk's first column.
    """

    offset: int
    width: int
    first: int


@dataclass(frozen=True)
class HeadPart:
    """The part of a KV head that keeps any channel in a layer's archive page.

    Attributes:
        kept: its kept K channels.
        k_chunks: its K, in chunks that lie one behind the other.
        v_offset: first element of V `[head_dim, archive_block]`.
        side_offset: first byte of what the format keeps beside K and V,
            `[archive_block // 32, side_bytes]` in the format's own order.
    """

    kept: int
    k_chunks: tuple[KChunk, ...]
    v_offset: int
    side_offset: int

    @property
    def k_offset(self) -> int:
        """First element of K."""
        return self.k_chunks[0].offset


@dataclass(frozen=True)
class CacheLayout:
    """Archive and window pages of one layer on one rank.

    Attributes:
        kept: kept K channels of each KV head, each a multiple of 16.
        head_dim: channels of a head.
        itemsize: bytes of an element of a window page.
        archive_block: tokens of an archive page.
        archive_format: how far tokens are stored.
        counts: numbers of kept channels, without 0, that kernels are compiled for: those of all
            layers of the model, so that layers share kernels. By default this layer's.

    Raises:
        ValueError: a head has too many channels, or a number that is not among `counts`.
    """

    kept: tuple[int, ...]
    head_dim: int
    itemsize: int
    archive_block: int
    archive_format: ArchiveFormat = NATIVE
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"{self.head_dim} channels of a head are more than {MAX_HEAD_DIM}")
        found = set(self.kept) - {0}
        if not self.counts:
            object.__setattr__(self, "counts", tuple(sorted(found)))
        if found - set(self.counts):
            raise ValueError(f"heads keep {sorted(found)} channels, not only {self.counts}")

    @cached_property
    def heads(self) -> tuple[HeadPart | None, ...]:
        """Each KV head's part of the archive page; None for one that keeps no channel."""
        parts: list[HeadPart | None] = []
        offset, block = 0, self.archive_block
        side_offset = (
            block * self.archive_itemsize * sum(kept + self.head_dim for kept in self.kept if kept)
        )
        for kept in self.kept:
            if not kept:
                parts.append(None)
                continue
            chunks, first = [], 0
            for width in CHUNK_WIDTHS:
                if kept & width:
                    chunks.append(KChunk(offset + first * block, width, first))
                    first += width
            parts.append(HeadPart(kept, tuple(chunks), offset + kept * block, side_offset))
            offset += (kept + self.head_dim) * block
            side_offset += self.archive_format.side_bytes * block // GRANULE
        return tuple(parts)

    @property
    def archive_itemsize(self) -> int:
        """Bytes of an element of an archive page."""
        return self.archive_format.itemsize(self.itemsize)

    @property
    def archive_page_bytes(self) -> int:
        """Bytes of the layer in an archive page."""
        token = archive_token_bytes(self.kept, self.head_dim, self.itemsize, self.archive_format)
        return token * self.archive_block

    @property
    def window_page_bytes(self) -> int:
        """Size of a window page."""
        return window_token_bytes(len(self.kept), self.head_dim, self.itemsize) * WINDOW_BLOCK


def archive_token_bytes(
    kept: Sequence[int], head_dim: int, itemsize: int, archive_format: ArchiveFormat = NATIVE
) -> int:
    """Bytes of one archived token of one layer, in whole units."""
    heads = (archive_format.token_bytes(count, head_dim, itemsize) for count in kept)
    return math.ceil(sum(heads) / TOKEN_BYTES_UNIT) * TOKEN_BYTES_UNIT


def window_token_bytes(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one dense token of one layer."""
    return num_kv_heads * 2 * head_dim * itemsize


def pages(tokens: int, block: int) -> int:
    """Pages of `block` tokens that hold `tokens` tokens."""
    return -(-tokens // block)
