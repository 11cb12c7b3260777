"""One head's part of all archive pages: writes and reads granules in their fields."""

from typing import Any

import torch
from vllm_leank.kernels.codecs.codec import Codec, Stored

from vllm_leank.core.head_part import Chunk, HeadPart
from vllm_leank.core.window import GRANULE


class HeadPages:
    """Views of a head's fields in every archive page.

    A granule is named by its page and its index among the page's granules.

    Args:
        pages: `[num_blocks, page_items]`, see `LayerCache.archive_pages`.
        part: where the head's fields lie.
        block: tokens of an archive page.
        side_bytes: see `ArchiveFormat`.
        together: granules whose tokens alternate in rows of V; see `ArchiveFormat`.
    """

    def __init__(
        self, pages: torch.Tensor, part: HeadPart, block: int, side_bytes: int, together: int = 1
    ) -> None:
        def field(chunk: Chunk) -> torch.Tensor:
            return pages[:, chunk.offset : chunk.offset + chunk.width * block]

        # [num_blocks, granules, 32, width] each
        self._keys = [field(c).unflatten(1, (-1, GRANULE, c.width)) for c in part.k_chunks]
        # [num_blocks, width, granules / together, 32, together] each
        rows = (-1, GRANULE, together)
        self._values = [field(c).unflatten(1, (c.width, *rows)) for c in part.v_chunks]
        self._together = together
        granules = block // GRANULE
        side = pages.view(torch.uint8)[:, part.side_offset :]
        # [num_blocks, granules, side_bytes]
        self._side = side[:, : granules * side_bytes].unflatten(1, (granules, side_bytes))
        self._k_chunks, self._v_chunks = part.k_chunks, part.v_chunks

    def write(self, pages: torch.Tensor, granules: torch.Tensor, stored: Stored) -> None:
        """Write granules, `[n]` of each."""
        for chunk, keys in zip(self._k_chunks, self._keys, strict=True):
            keys[pages, granules] = stored.key[..., _columns(chunk)]
        for chunk, values in zip(self._v_chunks, self._values, strict=True):
            value = stored.value[..., _columns(chunk)].transpose(1, 2)
            values[self._place(pages, granules)] = value
        self._side[pages, granules] = stored.side

    def _place(self, pages: torch.Tensor, granules: torch.Tensor) -> tuple[Any, ...]:
        """Where granules of V lie, `[n, width, 32]`."""
        rest = granules % self._together
        return pages, slice(None), granules // self._together, slice(None), rest

    def clear(self, pages: torch.Tensor, granules: torch.Tensor, codec: Codec) -> None:
        """Make granules without a token readable: V is finite, whatever K may be."""
        for values in () if codec.any_codes else self._values:
            values[self._place(pages, granules)] = 0
        self._side[pages, granules] = codec.empty_side.to(self._side.device)

    def read(self, pages: torch.Tensor, granules: torch.Tensor) -> Stored:
        """Read granules, `[n]` of each."""
        side = self._side[pages, granules]
        nothing = [side.new_empty((len(side), GRANULE, 0))]
        keys = [keys[pages, granules] for keys in self._keys]
        place = self._place(pages, granules)
        values = [values[place].transpose(1, 2) for values in self._values]
        return Stored(
            torch.cat(keys or nothing, dim=-1), torch.cat(values or nothing, dim=-1), side
        )


def _columns(chunk: Chunk) -> slice:
    return slice(chunk.first, chunk.first + chunk.width)
