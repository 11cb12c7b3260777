"""Where every byte of the cache lies: pages, heads within a page, chunks within a head.

Archive page of one layer (`archive_block` tokens), per KV head in order: the kept K channels as
chunks of the widths that add up to their number, each a power of two, at least 16 and widest first
(112 = 64 + 32 + 16), each chunk `[archive_block, width]` contiguous; then V transposed,
`[head_dim, archive_block]`. A head that keeps no channel has neither K nor V there.

An archive of 8-bit floats (e4m3, "fp8") has scales behind all heads: fp32
`[heads that keep any][K, V][archive_block // 32]`. An element's value is what is stored times the
scale of its head and 32 tokens.

Window page of one layer: `[num_kv_heads, 32, 2 * head_dim]`, K then V in the last dimension.

Nothing else in the project computes an offset or a size. Sizes are in bytes; offsets in elements,
but for those of scales, which are in bytes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from vllm_leank.core.window import GRANULE, Window

WINDOW_BLOCK = GRANULE
"""Tokens of a window page."""

CHUNK_WIDTHS = (256, 128, 64, 32, 16)
"""Widths of K chunks, widest first; the last is the finest alignment of a mask. A head has those of
the binary digits of the number of channels that it keeps."""

MAX_HEAD_DIM = CHUNK_WIDTHS[0]
"""Most channels of a head: more than the widest chunk has no layout."""

TOKEN_BYTES_UNIT = 16
"""An archive page has a multiple of this many bytes per token. Pages have multiples of 32 tokens,
so each begins at a multiple of 512 bytes: wide loads are aligned, and rows of up to 256 elements
of 2 bytes, or 512 of 1 byte, divide pages."""

SCALE_BYTES = 4
"""Bytes of a scale, an fp32 number; fp8 only."""

ARCHIVE_BLOCKS = tuple(range(GRANULE, 257, GRANULE))
"""Page sizes, in tokens, to choose the archive block from."""

ARCHIVE_WASTE = 0.05
"""Share of a pool block that an archive page may leave empty."""


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
class HeadLayout:
    """One KV head's part of an archive page.

    Attributes:
        k_chunks: its K chunks, none where it keeps no channel.
        v_offset: first element of V `[head_dim, archive_block]`; None where it keeps no channel,
            and so no V.
        scale_offset: first byte of its scales `[2, archive_block // 32]`, K's and then V's; None
            where there are none: it keeps no channel, or the archive is not fp8.
    """

    k_chunks: tuple[KChunk, ...]
    v_offset: int | None
    scale_offset: int | None


@dataclass(frozen=True)
class CacheLayout:
    """Archive and window pages of one layer on one rank.

    Attributes:
        kept: kept K channels of each KV head, each a multiple of 16.
        head_dim: channels of a head.
        itemsize: bytes of an element of a window page.
        archive_itemsize: bytes of an element of an archive page; 1 means fp8, with scales.
        archive_block: tokens of an archive page.
        archive_page_bytes: size of an archive page. May exceed what this rank's heads fill:
            all ranks of a layer have pages of one size.

    Raises:
        ValueError: a head has too many channels, or the heads do not fit into `archive_page_bytes`.
    """

    kept: tuple[int, ...]
    head_dim: int
    itemsize: int
    archive_itemsize: int
    archive_block: int
    archive_page_bytes: int

    def __post_init__(self) -> None:
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"{self.head_dim} channels of a head are more than {MAX_HEAD_DIM}")
        token_bytes = archive_token_bytes(self.kept, self.head_dim, self.archive_itemsize)
        if token_bytes * self.archive_block > self.archive_page_bytes:
            raise ValueError(
                f"{self.archive_block} tokens of {token_bytes} bytes do not fit into an archive "
                f"page of {self.archive_page_bytes}"
            )

    @property
    def is_fp8(self) -> bool:
        """Whether archive pages hold 8-bit floats and scales."""
        return self.archive_itemsize == 1

    @cached_property
    def heads(self) -> tuple[HeadLayout, ...]:
        """Layout of each KV head within the archive page."""
        heads, offset = [], 0
        scale_offset = self.archive_block * sum(
            (kept + self.head_dim) * self.archive_itemsize for kept in self.kept if kept
        )
        for kept in self.kept:
            chunks, first = [], 0
            for width in CHUNK_WIDTHS:
                if kept & width:
                    chunks.append(KChunk(offset, width, first))
                    first += width
                    offset += self.archive_block * width
            v_offset = offset if kept else None
            offset += self.archive_block * self.head_dim if kept else 0
            scaled = kept and self.is_fp8
            heads.append(HeadLayout(tuple(chunks), v_offset, scale_offset if scaled else None))
            scale_offset += 2 * self.archive_block // GRANULE * SCALE_BYTES if scaled else 0
        return tuple(heads)

    @property
    def archive_page_items(self) -> int:
        """Elements of an archive page."""
        return self.archive_page_bytes // self.archive_itemsize

    @property
    def window_page_bytes(self) -> int:
        """Size of a window page."""
        return window_token_bytes(len(self.kept), self.head_dim, self.itemsize) * WINDOW_BLOCK


def archive_token_bytes(kept: Sequence[int], head_dim: int, archive_itemsize: int) -> int:
    """Bytes of one archived token of one layer, before padding; with fp8, its share of the scales
    in whole bytes.
    """
    items = [count + head_dim for count in kept if count]
    scales = 2 * SCALE_BYTES * len(items) if archive_itemsize == 1 else 0
    return sum(items) * archive_itemsize + -(-scales // GRANULE)


def window_token_bytes(num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one dense token of one layer."""
    return num_kv_heads * 2 * head_dim * itemsize


def rank_heads(num_kv_heads: int, tp_size: int, rank: int) -> range:
    """KV heads that tensor-parallel rank `rank` holds; with more ranks than heads, each head
    has several ranks.
    """
    if tp_size <= num_kv_heads:
        per_rank = num_kv_heads // tp_size
        return range(rank * per_rank, (rank + 1) * per_rank)
    head = rank // (tp_size // num_kv_heads)
    return range(head, head + 1)


@dataclass(frozen=True)
class CachePlan:
    """Page sizes of a whole model, the same on every rank.

    Attributes:
        kept: kept K channels, `[num_layers][num_kv_heads]`.
        head_dim: channels of a head.
        itemsize: bytes of an element of a window page.
        archive_itemsize: bytes of an element of an archive page; 1 means fp8.
        tp_size: tensor-parallel ranks.
        archive_block: tokens of an archive page.
        token_bytes: bytes per token of each layer's archive page, padding included.
        draft_items: elements of a dense token over all layers of a draft model, on each rank; its
            window pages lie beside the others.
    """

    kept: tuple[tuple[int, ...], ...]
    head_dim: int
    itemsize: int
    archive_itemsize: int
    tp_size: int
    archive_block: int
    token_bytes: tuple[int, ...]
    draft_items: int = 0

    @property
    def is_fp8(self) -> bool:
        """Whether archive pages hold 8-bit floats and scales."""
        return self.archive_itemsize == 1

    def layer(self, index: int, rank: int = 0) -> CacheLayout:
        """Layout of layer `index` on tensor-parallel rank `rank`."""
        return CacheLayout(
            kept=tuple(self.kept[index][head] for head in self.rank_heads(rank)),
            head_dim=self.head_dim,
            itemsize=self.itemsize,
            archive_itemsize=self.archive_itemsize,
            archive_block=self.archive_block,
            archive_page_bytes=self.token_bytes[index] * self.archive_block,
        )

    def rank_heads(self, rank: int = 0) -> range:
        """KV heads of tensor-parallel rank `rank`."""
        return rank_heads(len(self.kept[0]), self.tp_size, rank)

    @property
    def dense_token_bytes(self) -> int:
        """Bytes of one dense token over all layers of a rank, a draft model's included."""
        layer = window_token_bytes(len(self.rank_heads()), self.head_dim, self.itemsize)
        return len(self.kept) * layer + self.draft_items * self.itemsize

    @property
    def archive_token_bytes(self) -> int:
        """Bytes of one archived token over all layers of a rank, padding included."""
        return sum(self.token_bytes)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of vLLM's pool: it can hold either group's pages of all layers."""
        return max(
            self.archive_token_bytes * self.archive_block, self.dense_token_bytes * WINDOW_BLOCK
        )

    def blocks_held(self, window: Window, length: int, freed: int) -> int:
        """Blocks of a request of `length` tokens whose first `freed` window pages after the sink
        have been freed.
        """
        archive = pages(window.archived(length), self.archive_block)
        return archive + pages(length, WINDOW_BLOCK) - freed

    def blocks_in_prefill(self, window: Window, length: int, in_flight: int = 1) -> int:
        """Blocks that a prompt of `length` tokens holds at most while it is computed, `in_flight`
        tokens at once.
        """
        archive = pages(window.archived(length), self.archive_block)
        return archive + pages(window.most_dense(length, in_flight), WINDOW_BLOCK)

    def blocks_in_decode(self, window: Window, length: int) -> int:
        """Blocks that a request of `length` tokens holds once its prompt is done."""
        return self.blocks_held(window, length, len(window.free_tokens(length, 0)))


def plan_cache(
    kept: Sequence[Sequence[int]],
    head_dim: int,
    itemsize: int,
    tp_size: int = 1,
    archive_itemsize: int | None = None,
    draft_items: int = 0,
) -> CachePlan:
    """Choose the page sizes for a mask.

    Args:
        kept: kept K channels, `[num_layers][num_kv_heads]`.
        head_dim: channels of a head.
        itemsize: bytes of an element of a window page.
        tp_size: tensor-parallel ranks; every rank gets the page of the largest.
        archive_itemsize: bytes of an element of an archive page; 1 means fp8, None `itemsize`.
        draft_items: elements of a dense token of a draft model on each rank.

    Returns:
        The plan. Its pages always give vLLM two cache groups.
    """
    archive_itemsize = archive_itemsize or itemsize
    token_bytes = []
    for layer in kept:
        largest = max(
            archive_token_bytes(
                [layer[head] for head in rank_heads(len(layer), tp_size, rank)],
                head_dim,
                archive_itemsize,
            )
            for rank in range(tp_size)
        )
        token_bytes.append(max(-(-largest // TOKEN_BYTES_UNIT), 1) * TOKEN_BYTES_UNIT)
    token_bytes = uneven(token_bytes)

    plan = CachePlan(
        kept=tuple(tuple(int(count) for count in layer) for layer in kept),
        head_dim=head_dim,
        itemsize=itemsize,
        archive_itemsize=archive_itemsize,
        tp_size=tp_size,
        archive_block=ARCHIVE_BLOCKS[-1],
        token_bytes=tuple(token_bytes),
        draft_items=draft_items,
    )
    block = _archive_block(plan.archive_token_bytes, plan.dense_token_bytes)
    return replace(plan, archive_block=block)


def _archive_block(archive_token_bytes: int, dense_token_bytes: int) -> int:
    """The smallest archive block whose pages nearly fill a pool block, or else the largest.

    A pool block is as large as the larger group's pages, and far tokens are most of what a long
    request holds: their pages may waste `ARCHIVE_WASTE` of it at most.
    """
    window = dense_token_bytes * WINDOW_BLOCK
    fitting = (
        block
        for block in ARCHIVE_BLOCKS
        if archive_token_bytes * block >= (1 - ARCHIVE_WASTE) * window
    )
    return next(fitting, ARCHIVE_BLOCKS[-1])


def uneven(sizes: Sequence[int]) -> list[int]:
    """Sizes of which no two or more come in equal numbers of layers.

    vLLM takes archive pages whose sizes all occur equally often for a repeating pattern of
    layers and splits the window layers into many groups, at a great loss of capacity
    (`_get_packed_kv_cache_groups`, vLLM 0.32). Raising one layer to the next larger size, where
    the gap is smallest, breaks the pattern.
    """
    sizes = list(sizes)
    while len(counts := Counter(sizes)) > 1 and len(set(counts.values())) == 1:
        ordered = sorted(counts)
        smaller, larger = min(pairwise(ordered), key=lambda pair: pair[1] - pair[0])
        sizes[sizes.index(smaller)] = larger
    return sizes


def pages(tokens: int, block: int) -> int:
    """Pages of `block` tokens that hold `tokens` tokens."""
    return -(-tokens // block)
