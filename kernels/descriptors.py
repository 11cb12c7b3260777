"""Tensor descriptors of one layer's pages, for tiles that the tensor memory accelerator loads."""

from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_leank.core.formats.whole import CHUNK_WIDTHS
from vllm_leank.core.pages import WINDOW_BLOCK, CacheLayout


def describe_pages(
    window_pages: torch.Tensor, archive_pages: torch.Tensor, layout: CacheLayout, tile: int
) -> tuple[TensorDescriptor, ...]:
    """Views of the pages as `[page, row, column]`, each with rows of one length.

    A third dimension for the page keeps coordinates small and addresses beyond 2^31 elements safe.
    Tiles are padded to a power of two of channels.

    Args:
        window_pages: see `LayerCache`.
        archive_pages: see `LayerCache`.
        layout: the layer's.
        tile: tokens of an archive tile.

    Returns:
        Rows of K and V of one token and head in window pages, tiles `[1, 32, head_dim]`; rows of
        one V channel's tokens, tiles `[1, head_dim, tile]`; and for each of `CHUNK_WIDTHS` rows of
        a K chunk, tiles `[1, tile, width]`; for a width that no layer has, the pages alone.
    """
    padded = 1 << (layout.head_dim - 1).bit_length()
    window = _describe(window_pages.flatten(1, 2), 2 * layout.head_dim, [1, WINDOW_BLOCK, padded])
    value = _describe(archive_pages, layout.archive_block, [1, padded, tile])
    keys = tuple(
        _describe(archive_pages, width, [1, tile, width])
        if any(profile.kept & width for profile in layout.variants)
        else archive_pages
        for width in CHUNK_WIDTHS
    )
    return window, value, *keys


def stand_ins(pages: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What kernels that load through pointers take instead of descriptors."""
    return (pages,) * (2 + len(CHUNK_WIDTHS))


def _describe(pages: torch.Tensor, row: int, tile: list[int]) -> Any:
    items = pages[0].numel()
    # A layer that keeps nothing has no rows; one is described all the same, and never read.
    shape = [len(pages), max(items // row, 1), row]
    return TensorDescriptor(pages, shape, [pages.stride(0), row, 1], tile)
