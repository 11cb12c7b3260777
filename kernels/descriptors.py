"""Tensor descriptors of one layer's pages, for tiles that the tensor memory accelerator loads."""

from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_leank.kernels.codecs import codec_of

from vllm_leank.core.formats.whole import CHUNK_WIDTHS
from vllm_leank.core.pages import CacheLayout

PARTS = 6
"""Descriptors of archive pages that kernels take."""

ROW_WIDTHS = (16, 32, 64, 128, 256)
"""Of the fields of V in packed pages, in bytes of a token."""


def describe_pages(
    window_pages: torch.Tensor,
    archive_pages: torch.Tensor,
    layout: CacheLayout,
    tile: int,
    window_tile: int,
) -> tuple[Any, ...]:
    """Views of the pages as `[page, row, column]`, each with rows of one length.

    A third dimension for the page keeps coordinates small and addresses beyond 2^31 elements safe.
    Tiles are padded to a power of two of channels.

    Args:
        window_pages: see `LayerCache`.
        archive_pages: see `LayerCache`.
        layout: the layer's.
        tile: tokens of an archive tile.
        window_tile: tokens of a window tile.

    Returns:
        Rows of K and V of one token and head in window pages, tiles `[1, window_tile, head_dim]`;
        then `PARTS` of the archive, as the format's folds take them: see `_whole` and `_packed`.
        What no layer has stands for the pages alone.
    """
    padded = 1 << (layout.head_dim - 1).bit_length()
    window = _describe(window_pages.flatten(1, 2), 2 * layout.head_dim, [1, window_tile, padded])
    whole = codec_of(layout.archive_format).whole_channels
    parts = (_whole if whole else _packed)(archive_pages, layout, tile)
    return window, *(archive_pages if one is None else one for one in parts)


def _whole(pages: torch.Tensor, layout: CacheLayout, tile: int) -> list[Any]:
    """Rows of one V channel's tokens, tiles `[1, head_dim, tile]`; and for each of `CHUNK_WIDTHS`
    rows of a K chunk, tiles `[1, tile, width]`.
    """
    padded = 1 << (layout.head_dim - 1).bit_length()
    parts = [_describe(pages, layout.archive_block, [1, padded, tile])]
    for width in CHUNK_WIDTHS:
        used = any(profile.kept & width for profile in layout.variants)
        parts.append(_describe(pages, width, [1, tile, width]) if used else None)
    return parts + [None] * (PARTS - len(parts))


def _packed(pages: torch.Tensor, layout: CacheLayout, tile: int) -> list[Any]:
    """For each of `ROW_WIDTHS` bytes as many rows of one V field, each a dimension's tokens, in
    halves of words, tiles `[1, width, tile / 2]`; then scales of V, tiles `[1, 1, tile]`. Threads
    load K themselves.
    """
    widths = {
        chunk.width
        for profile in layout.variants
        for chunk in layout.archive_format.head_part(profile, tile, 1, 0).v_chunks
    }
    block, halves = layout.archive_block, pages.view(torch.uint16)
    parts: list[Any] = [
        _describe(halves, block // 2, [1, width, tile // 2]) if width in widths else None
        for width in ROW_WIDTHS
    ]
    return [*parts, _describe(pages.view(torch.float16), block, [1, 1, tile])]


def _describe(pages: torch.Tensor, row: int, tile: list[int]) -> Any:
    items = pages[0].numel()
    # A layer that keeps nothing has no rows; one is described all the same, and never read.
    shape = [len(pages), max(items // row, 1), row]
    return TensorDescriptor(pages, shape, [pages.stride(0), row, 1], tile)
