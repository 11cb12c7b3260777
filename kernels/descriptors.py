"""Tensor descriptors of one layer's pages, for tiles that the tensor memory accelerator loads."""

from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_leank.core.layout import WINDOW_BLOCK, CacheLayout

K_WIDTHS = (16, 32, 64, 128, 256)
"""Widths of K chunks, in the order of the kernels' arguments."""

ARGUMENTS = 2 + len(K_WIDTHS)
"""Descriptors that a kernel takes."""


@dataclass(frozen=True)
class Descriptors:
    """Views of the pages as `[page, row, column]`, each with rows of one length.

    A third dimension for the page keeps coordinates small and addresses beyond 2^31 elements safe.

    Attributes:
        window: rows of K and V of one token and head; tiles `[1, 32, head_dim]`.
        value: rows of one V channel's tokens; tiles `[1, head_dim, tile]`.
        keys: by width, rows of one K chunk; tiles `[1, tile, width]`.
    """

    window: TensorDescriptor
    value: TensorDescriptor
    keys: dict[int, TensorDescriptor]

    @classmethod
    def of(
        cls,
        window_pages: torch.Tensor,
        archive_pages: torch.Tensor,
        layout: CacheLayout,
        tile: int,
    ) -> "Descriptors":
        """Descriptors of a layer's pages, with `tile` tokens in a tile of the archive; tiles are
        padded to a power of two of channels.
        """
        head_dim = layout.head_dim
        padded = 1 << (head_dim - 1).bit_length()
        window = window_pages.flatten(1, 2)
        return cls(
            window=_describe(window, 2 * head_dim, [1, WINDOW_BLOCK, padded]),
            value=_describe(archive_pages, layout.archive_block, [1, padded, tile]),
            keys={
                width: _describe(archive_pages, width, [1, tile, width])
                for width in {chunk.width for head in layout.heads for chunk in head.k_chunks}
            },
        )

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order of the kernels' arguments; a width that no head has stands in as V's."""
        return (self.window, self.value, *(self.keys.get(width, self.value) for width in K_WIDTHS))


def _describe(pages: torch.Tensor, row: int, tile: list[int]) -> TensorDescriptor:
    items = pages[0].numel()
    shape = [len(pages), items // row, row]
    return TensorDescriptor(pages, shape, [pages.stride(0), row, 1], tile)
