"""What the kernels know of one layer's pages on the device: offsets, channels, shares of work."""

from collections.abc import Sequence

import torch
from vllm_leank.kernels.launch import Device, decode_programs_of_all, share_programs

from vllm_leank.layout import CacheLayout
from vllm_leank.window import Window

NOMINAL_LENGTH = 8192
"""Length of the request for which heads share a request's programs in proportion to their bytes."""


class Tables:
    """Device tables of one layer.

    Args:
        layout: the layer's pages.
        channels: per KV head, the kept K channels, ascending.
        window: the dense window.
        device: where the kernels run.

    Attributes:
        heads: int32 `[num_kv_heads, 5]`: kept channels, the first of them in `channels`, and where
            K, V (in elements) and scales (in floats) begin within an archive page.
        channels: int32 `[total kept]`.
        columns: int32 `[total kept, 3]`: K channel, the element of an archive page where its
            column begins, and the elements from one token to the next.
        counts: the kept counts that occur, ascending, without 0.
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
        for kept, head in zip(layout.kept, layout.heads, strict=True):
            k_offset = head.k_chunks[0].offset if kept else 0
            rows.append(
                (kept, start, k_offset, head.v_offset or 0, (head.scale_offset or 0) // 4)
            )
            start += kept
        self.heads = torch.tensor(rows, dtype=torch.int32, device=device)
        self.channels = torch.cat(tuple(channels)).to(device=device, dtype=torch.int32)
        columns = [
            (chunk.offset + i, chunk.width)
            for head in layout.heads
            for chunk in head.k_chunks
            for i in range(chunk.width)
        ]
        places = torch.tensor(columns, dtype=torch.int32, device=device).view(-1, 2)
        self.columns = torch.cat((self.channels[:, None], places), dim=1)
        self.counts = tuple(sorted(set(layout.kept) - {0}))
        self.device = Device.of(device)
        dense = window.sink + window.recent
        far = NOMINAL_LENGTH - dense
        costs = [
            dense * 2 * layout.head_dim * layout.itemsize
            + far * (kept and kept + layout.head_dim) * layout.archive_itemsize
            for kept in layout.kept
        ]
        # All of them now: while a CUDA graph is captured no tensor may come from the host.
        self._work = {
            programs: _share_work(costs, programs, device)
            for programs in decode_programs_of_all(len(layout.kept), self.device)
        }
        self._arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def work(self, programs: int) -> torch.Tensor:
        """How `programs` programs of a request are shared out over the heads, int32
        `[programs, 3]`: KV head, which of its splits, and the number of its splits.
        """
        return self._work[programs]

    def arrived(self, num_reqs: int) -> torch.Tensor:
        """Counters of finished splits, int32 `[num_reqs * num_kv_heads]` or more; all 0 between
        launches.
        """
        if len(self._arrived) < num_reqs * len(self.heads):
            self._arrived = self._arrived.new_zeros(2 * num_reqs * len(self.heads))
        return self._arrived


def _share_work(costs: Sequence[float], programs: int, device: torch.device) -> torch.Tensor:
    counts = share_programs(costs, programs)
    rows = [(head, i, count) for head, count in enumerate(counts) for i in range(count)]
    return torch.tensor(rows, dtype=torch.int32, device=device)

