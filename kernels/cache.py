"""One layer's pages and what it takes to read them."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from vllm_leank.kernels.channels import HeadChannels
from vllm_leank.kernels.codecs import Codec, codec_of
from vllm_leank.kernels.head_pages import HeadPages
from vllm_leank.kernels.prepared import Prepares
from vllm_leank.kernels.scratch import Scratch

from vllm_leank.core.pages import CacheLayout
from vllm_leank.core.selection import Selection
from vllm_leank.core.window import Window

if TYPE_CHECKING:
    from vllm_leank.kernels.tables import Tables


@dataclass(frozen=True, eq=False)
class LayerCache(Prepares):
    """One layer's pages, its mask and the rule for reading them.

    Attributes:
        window_pages: `[num_blocks, num_kv_heads, window_block, 2 * head_dim]`, K then V.
        archive_pages: `[num_blocks, page_items]`, described by `layout`; rows may lie apart. Of the
            codec's dtype.
        layout: where heads and chunks lie within an archive page.
        heads: per KV head, what is known of its channels.
        window: the dense window.
        sink_scores: `[num_heads]`, attention sinks of query heads in any float dtype; None: the
            model has none.
        selection: how many segments of far tokens a query reads; None: all.
        scratch: room for far tokens that are unpacked for prompts; None: they are not.
    """

    window_pages: torch.Tensor
    archive_pages: torch.Tensor
    layout: CacheLayout
    heads: tuple[HeadChannels, ...]
    window: Window
    sink_scores: torch.Tensor | None = None
    scratch: Scratch | None = None
    selection: Selection | None = None

    @cached_property
    def codec(self) -> Codec:
        """What writes and reads the archive's numbers."""
        return codec_of(self.layout.archive_format)

    @property
    def channels(self) -> tuple[torch.Tensor, ...]:
        """Per KV head, int64 `[kept]`: the stored K channels, in the order of the pages."""
        return tuple(head.k.stored for head in self.heads)

    @cached_property
    def head_pages(self) -> tuple[HeadPages | None, ...]:
        """Per KV head, its part of the archive's pages; None for one that stores nothing."""
        layout, form = self.layout, self.layout.archive_format
        return tuple(
            None
            if part is None
            else HeadPages(
                self.archive_pages, part, layout.archive_block, form.side_bytes, form.together
            )
            for part in layout.heads
        )

    @cached_property
    def side(self) -> torch.Tensor:
        """The archive's pages in the dtype of what the format keeps beside K and V."""
        return self.archive_pages.view(torch.uint8).view(self.codec.side_dtype)

    @cached_property
    def tables(self) -> "Tables":
        """Device tables for the Triton kernels. Made on first use, which must not be while a CUDA
        graph is captured.
        """
        from vllm_leank.kernels.tables import Tables

        device, selects = self.window_pages.device, self.selection is not None
        return Tables(self.layout, self.heads, self.window, device, selects)

    def descriptor_arguments(self, tile: int, window_tile: int, tma: bool) -> dict[str, Any]:
        """What kernels take as tensor descriptors of the pages, for archive tiles of `tile` tokens
        and window tiles of `window_tile`: `window_desc` of window pages, and `d0` to `d5` of the
        archive's. Without `tma`, where they load through pointers, stand-ins.
        """
        return self.prepared(_descriptor_arguments, tile, window_tile, tma)


def _descriptor_arguments(
    cache: LayerCache, tile: int, window_tile: int, tma: bool
) -> dict[str, Any]:
    from vllm_leank.kernels.descriptors import PARTS, describe_pages

    pages = cache.window_pages, cache.archive_pages
    parts: Iterable[Any] = repeat(cache.archive_pages)
    if tma:
        parts = describe_pages(*pages, cache.layout, tile, window_tile)
    return dict(zip(("window_desc", *(f"d{i}" for i in range(PARTS))), parts, strict=False))
