"""One layer's pages and what it takes to read them."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from vllm_leank.core.layout import CacheLayout
from vllm_leank.core.window import Window

if TYPE_CHECKING:
    from vllm_leank.kernels.descriptors import Descriptors
    from vllm_leank.kernels.tables import Tables


@dataclass(frozen=True, eq=False)
class LayerCache:
    """One layer's pages, its mask and the rule for reading them.

    Attributes:
        window_pages: `[num_blocks, num_kv_heads, 32, 2 * head_dim]`, K then V.
        archive_pages: `[num_blocks, page_items]`, described by `layout`; rows may lie apart. Of the
            model's dtype or `float8_e4m3fn`.
        layout: where heads and chunks lie within an archive page.
        channels: per KV head, int64 `[kept]`: the kept K channels, ascending.
        window: the dense window.
    """

    window_pages: torch.Tensor
    archive_pages: torch.Tensor
    layout: CacheLayout
    channels: tuple[torch.Tensor, ...]
    window: Window

    @cached_property
    def scales(self) -> torch.Tensor:
        """The archive's pages as fp32 `[num_blocks, page_bytes / 4]`; an fp8 archive has its
        scales there.
        """
        if not self.layout.is_fp8:
            return self.archive_pages
        return self.archive_pages.view(torch.uint8).view(torch.float32)

    @cached_property
    def tables(self) -> "Tables":
        """Device tables for the Triton kernels. Made on first use, which must not be while a CUDA
        graph is captured.
        """
        from vllm_leank.kernels.tables import Tables

        return Tables(self.layout, self.channels, self.window, self.window_pages.device)

    def descriptor_arguments(self, tile: int, tma: bool) -> tuple[Any, ...]:
        """What kernels take as tensor descriptors of the pages, for archive tiles of `tile` tokens;
        without `tma`, where they load through pointers, stand-ins.
        """
        from vllm_leank.kernels.descriptors import ARGUMENTS, Descriptors

        if not tma:
            return (self.archive_pages,) * ARGUMENTS
        if tile not in self._descriptors:
            self._descriptors[tile] = Descriptors.of(
                self.window_pages, self.archive_pages, self.layout, tile
            )
        return self._descriptors[tile].arguments

    @cached_property
    def _descriptors(self) -> "dict[int, Descriptors]":
        return {}
