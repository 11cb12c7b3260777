"""What the kernels know of one layer's pages on the device: offsets, channels, shares of work."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm_leank.kernels.launch import (
    Device,
    decode_programs_of_all,
    share_programs,
    tile_tokens,
)

from vllm_leank.core.pages import CacheLayout
from vllm_leank.core.window import Window

NOMINAL_LENGTH = 8192
"""Length of the request for which heads share a request's programs in proportion to their bytes."""


@dataclass(frozen=True)
class Work:
    """Shares of a request's programs.

    Attributes:
        programs: int32 `[programs, 8]`: KV head, which of its splits, number of its splits, and the
            head's row of `Tables.heads`.
        heads: int32 `[num_kv_heads, 3]`: first program, number of programs, kept channels.
        largest: most programs that a head has.
    """

    programs: torch.Tensor
    heads: torch.Tensor
    largest: int

    def to(self, device: torch.device) -> "Work":
        """On another device."""
        return Work(self.programs.to(device), self.heads.to(device), self.largest)


class Tables:
    """Device tables of one layer.

    Args:
        layout: the layer's pages.
        channels: per KV head, the kept K channels, ascending.
        window: the dense window.
        device: where the kernels run.

    Attributes:
        heads: int32 `[num_kv_heads, 5]`: kept channels, the first of them in `channels`, and where
            K, V (in elements) and side data (in floats) begin within the layer's part of an
            archive page.
        channels: int32 `[total kept]`.
        columns: int32 `[total kept, 3]`: K channel, the element of an archive page where its
            column begins, and the elements from one token to the next.
        archive_units: units of 256 bytes of one archive tile of all heads.
        device: what launches depend on.
    """

    def __init__(
        self,
        layout: CacheLayout,
        channels: Sequence[torch.Tensor],
        window: Window,
        device: torch.device,
    ) -> None:
        rows, start = [], 0
        for head in layout.heads:
            if head is None:
                rows.append((0, start, 0, 0, 0))
                continue
            rows.append((head.kept, start, head.k_offset, head.v_offset, head.side_offset // 4))
            start += head.kept
        heads = torch.tensor(rows, dtype=torch.int32)
        self.heads = heads.to(device)
        self.channels = torch.cat(tuple(channels)).to(device=device, dtype=torch.int32)
        columns = [
            (chunk.offset + i, chunk.width)
            for head in layout.heads
            if head is not None
            for chunk in head.k_chunks
            for i in range(chunk.width)
        ]
        places = torch.tensor(columns, dtype=torch.int32, device=device).view(-1, 2)
        self.columns = torch.cat((self.channels[:, None], places), dim=1)
        self.device = Device.of(device)
        self.archive_units = sum(
            (kept + layout.head_dim) * tile_tokens(layout) * layout.archive_itemsize // 256
            for kept in layout.kept
            if kept
        )
        dense = (window.sink + window.recent) * 2 * layout.head_dim * layout.itemsize
        far = NOMINAL_LENGTH - window.sink - window.recent
        costs: list[float] = [
            dense + far * (kept and kept + layout.head_dim) * layout.archive_itemsize
            for kept in layout.kept
        ]
        # Half of an even share on top: in short requests all heads read the same.
        costs = [cost + sum(costs) / len(costs) / 2 for cost in costs]
        # All of them now: while a CUDA graph is captured no tensor may come from the host.
        self._work = {
            programs: _share_work(heads, costs, programs).to(device)
            for programs in decode_programs_of_all(len(layout.kept))
        }

    def work(self, programs: int) -> Work:
        """How `programs` programs of a request are shared out over the heads."""
        return self._work[programs]


def _share_work(heads: torch.Tensor, costs: Sequence[float], programs: int) -> Work:
    """Share programs out over heads of unequal cost."""
    counts = share_programs(costs, programs)
    firsts = [sum(counts[:head]) for head in range(len(counts))]
    rows = [
        (head, i, count, *heads[head].tolist())
        for head, count in enumerate(counts)
        for i in range(count)
    ]
    of_heads = list(zip(firsts, counts, heads[:, 0].tolist(), strict=True))
    return Work(
        programs=torch.tensor(rows, dtype=torch.int32),
        heads=torch.tensor(of_heads, dtype=torch.int32),
        largest=max(counts),
    )
