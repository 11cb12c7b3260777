"""The page sizes of a whole model, the same on every rank and pipeline stage.

Layers are those that leank serves, numbered from 0. The layers of a pipeline stage share archive
pages: one page holds some tokens of all of them, one layer behind the other. Each layer has window
pages of its own, all of one size.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from vllm_leank.core.formats import ArchiveFormat
from vllm_leank.core.layers import SlidingLayers
from vllm_leank.core.pages import (
    LEAST_BLOCK,
    TOKEN_BYTES_UNIT,
    CacheLayout,
    archive_token_bytes,
    pages,
    window_token_bytes,
)
from vllm_leank.core.profile import Profile, Profiles
from vllm_leank.core.states import StateLayers
from vllm_leank.core.window import Window


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
    """Page sizes of a whole model.

    Attributes:
        profiles: class widths of every head, `[num_layers][num_kv_heads]`.
        head_dim: channels of a head.
        itemsize: bytes of an element of a window page.
        archive_format: how far tokens are stored.
        tp_size: tensor-parallel ranks.
        stages: layers of each pipeline stage.
        archive_block: tokens of an archive page.
        window_block: tokens of a window page, of every layer on every rank: 32, or beside states a
            multiple.
        draft_items: elements of a dense token over all layers of a draft model, on each rank; its
            window pages lie beside those of the last stage.
        sliding: layers that stay vLLM's, whose pages lie in blocks of the same pool.
        states: layers that stay vLLM's as well, whose states lie there too.
    """

    profiles: Profiles
    head_dim: int
    itemsize: int
    archive_format: ArchiveFormat
    tp_size: int
    stages: tuple[int, ...]
    archive_block: int
    window_block: int = LEAST_BLOCK
    draft_items: int = 0
    sliding: SlidingLayers | None = None
    states: StateLayers | None = None

    def layer(self, index: int, rank: int = 0) -> CacheLayout:
        """Layout of layer `index` on tensor-parallel rank `rank`."""
        return CacheLayout(
            profiles=self._profiles(index, rank),
            head_dim=self.head_dim,
            itemsize=self.itemsize,
            archive_block=self.archive_block,
            archive_format=self.archive_format,
            variants=self.variants,
            window_block=self.window_block,
        )

    @cached_property
    def variants(self) -> tuple[Profile, ...]:
        """Profiles of the heads of any layer that store anything, ascending."""
        found = {profile for layer in self.profiles for profile in layer if profile.stores}
        return tuple(sorted(found))

    def rank_heads(self, rank: int = 0) -> range:
        """KV heads of tensor-parallel rank `rank`."""
        return rank_heads(len(self.profiles[0]), self.tp_size, rank)

    def archive_offset(self, index: int, rank: int = 0) -> int:
        """First byte of layer `index` within its stage's archive page."""
        first = max(first for first in self.first_layers if first <= index)
        return self.archive_block * self._archive_bytes(range(first, index), rank)

    @property
    def first_layers(self) -> tuple[int, ...]:
        """First layer of each stage."""
        return tuple(accumulate(self.stages[:-1], initial=0))

    @cached_property
    def stage_token_bytes(self) -> int:
        """Bytes of one archived token over all layers of a stage: those of the largest stage and
        rank, since pages are equal everywhere.
        """
        most = max(
            self._archive_bytes(range(first, first + count), rank)
            for first, count in zip(self.first_layers, self.stages, strict=True)
            for rank in range(self.tp_size)
        )
        # Never without a page, and never as large as a layer's window page: vLLM would take that
        # for layers of one kind (`_get_packed_kv_cache_groups`).
        most = max(most, TOKEN_BYTES_UNIT)
        window = self._window_bytes * self.window_block
        return most + TOKEN_BYTES_UNIT * (most * self.archive_block == window)

    @property
    def archive_page_bytes(self) -> int:
        """Bytes of a stage's archive page."""
        return self.stage_token_bytes * self.archive_block

    @property
    def archive_token_bytes(self) -> int:
        """Bytes of one archived token over all stages of a rank, padding included."""
        return len(self.stages) * self.stage_token_bytes

    @property
    def dense_token_bytes(self) -> int:
        """Bytes of one dense token over all layers of a rank, a draft model's included."""
        return len(self.profiles) * self._window_bytes + self.draft_items * self.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of vLLM's pool over all stages of a rank: it can hold either group's
        pages of a stage, and stages have equal numbers of blocks.
        """
        return len(self.stages) * self._stage_block_bytes

    @property
    def _stage_block_bytes(self) -> int:
        """Bytes of one block on a stage; pages of sliding layers never make it larger."""
        return max(self.archive_page_bytes, self.stage_least_bytes)

    @property
    def stage_least_bytes(self) -> int:
        """Bytes of a block on a stage but for archive pages: window pages, or one state."""
        state = 0 if self.states is None else self.states.state_bytes
        return max(self._stage_window_bytes, state)

    @property
    def _stage_window_bytes(self) -> int:
        """Bytes of the window pages of a stage, of the largest."""
        *others, last = (count * self._window_bytes for count in self.stages)
        return self.window_block * max(*others, last + self.draft_items * self.itemsize, 0)

    @property
    def _window_bytes(self) -> int:
        """Bytes of one dense token of one layer."""
        return window_token_bytes(len(self.rank_heads()), self.head_dim, self.itemsize)

    def _profiles(self, index: int, rank: int) -> tuple[Profile, ...]:
        return tuple(self.profiles[index][head] for head in self.rank_heads(rank))

    def _archive_bytes(self, layers: range, rank: int) -> int:
        """Bytes of one archived token over some layers of a rank."""
        return sum(
            archive_token_bytes(self._profiles(layer, rank), self.itemsize, self.archive_format)
            for layer in layers
        )

    def blocks_held(self, window: Window, length: int, exact_until: int) -> int:
        """Blocks that a request of `length` tokens holds, less those of other layers, once window
        pages that no query from `exact_until` on reads have been freed.
        """
        freed = len(window.free_pages(length, exact_until, self.window_block))
        archive = pages(window.archived(length), self.archive_block)
        return archive + pages(length, self.window_block) - freed

    def blocks_in_prefill(self, window: Window, length: int, in_flight: int = 1) -> int:
        """Blocks that a prompt of `length` tokens holds at most while it is computed, `in_flight`
        tokens at once.
        """
        archive = pages(window.archived(length), self.archive_block)
        dense = pages(window.most_dense(length, in_flight), self.window_block)
        return archive + dense + self._other_blocks(length, in_flight)

    def blocks_in_decode(self, window: Window, length: int) -> int:
        """Blocks that a request of `length` tokens holds once its prompt is done."""
        return self.blocks_held(window, length, 0) + self._other_blocks(length)

    def other_bytes(self, length: int) -> int:
        """Bytes that other layers of a rank keep of a request of `length` tokens."""
        kept = 0
        if self.sliding is not None:
            kept += self.sliding.count * min(self.sliding.window, length) * self._window_bytes
        if self.states is not None:
            kept += self.states.count * self.states.state_bytes
        return kept

    def _other_blocks(self, length: int, in_flight: int = 1) -> int:
        """Blocks of other layers: vLLM puts as many layers into a block as fit."""
        blocks = 0
        if self.sliding is not None:
            in_block = self._stage_block_bytes // (self._window_bytes * LEAST_BLOCK)
            groups = pages(self.sliding.count, in_block)
            blocks += groups * self.sliding.pages(length, in_flight)
        if self.states is not None:
            in_block = self._stage_block_bytes // self.states.state_bytes
            blocks += pages(self.states.count, in_block)
        return blocks
