"""What the kernels know of one layer's pages on the device: offsets, channels, shares of work."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from itertools import groupby

import torch
from vllm_leank.kernels.channels import HeadChannels
from vllm_leank.kernels.codecs import codec_of
from vllm_leank.kernels.launch import (
    DecodeLaunch,
    Device,
    programs_of_any_few,
    tile_tokens,
)

from vllm_leank.core.formats.packed import CODE_CLASSES
from vllm_leank.core.pages import CacheLayout
from vllm_leank.core.window import Window

NOMINAL_LENGTH = 8192
"""Length of the request for which heads share a request's programs in proportion to their bytes; it
is twice that of the window where that is more.
"""


@dataclass(frozen=True)
class Work:
    """Shares of a request's programs; of many requests' the order of heads, one row for each.

    Attributes:
        programs: int32 `[programs, 9]`: KV head, which of its splits, number of its splits, where
            its results lie among those of a request, and the head's row of `Tables.heads`.
        heads: int32 `[num_kv_heads, 3]`: first program, number of programs, units of 256
            bytes of one tile.
    """

    programs: torch.Tensor
    heads: torch.Tensor

    def to(self, device: torch.device) -> "Work":
        """On another device."""
        return Work(self.programs.to(device), self.heads.to(device))


class Tables:
    """Device tables of one layer.

    Args:
        layout: the layer's pages.
        channels: what is known of each KV head's channels.
        window: the dense window.
        device: where the kernels run.
        selects: whether queries select the segments of far tokens that they read.

    Attributes:
        heads: int32 `[num_kv_heads, 5]`: variant, first row in `columns`, and where the head begins
            within the layer's part of an archive page (in elements), units of 256 bytes of one
            tile of it, and where its side data begins (in numbers of the codec's dtype).
        variants: numbers that stand for the profiles that kernels are compiled for.
        order: int32 `[5, num_kv_heads, head_dim]`: channels of K and of V as they are stored, where
            each channel of V, and of K, stands in stored order, and `Codec.query_places`.
        numbers: fp32 `[7, num_kv_heads, head_dim]`: 0 means of K that scores are made with, in
            stored order; 1 factors of K, in stored order; 2 means of V by channel; 3 factors of V,
            in stored order; 4 and 5 means of K and of V in stored order, which codes are made with;
            6 half of the largest code of K, in stored order, which stands for the mean.
        columns: int32 `[stored K channels, 3]`, for formats of whole channels: K channel, the
            element of an archive page where its column begins, and the elements from one token to
            the next.
        tile: tokens of the tiles that units are of.
        archive_units: units of 256 bytes of one archive tile of all heads.
        device: what launches depend on.
    """

    def __init__(
        self,
        layout: CacheLayout,
        channels: Sequence[HeadChannels],
        window: Window,
        device: torch.device,
        selects: bool = False,
    ) -> None:
        codec = codec_of(layout.archive_format)
        self.tile = tile_tokens(layout, selects)
        units = [
            layout.archive_format.token_bytes(profile, layout.itemsize) * self.tile // 256
            for profile in layout.profiles
        ]
        rows, start = [], 0
        for head, unit in zip(layout.heads, units, strict=True):
            if head is None:
                rows.append((0, start, 0, 0, 0))
                continue
            variant = layout.archive_format.variant(head.profile)
            side = head.side_offset // codec.side_dtype.itemsize
            rows.append((variant, start, head.offset, max(unit, 1), side))
            start += head.kept
        heads = torch.tensor(rows, dtype=torch.int32)
        self.heads = heads.to(device)
        self.variants = tuple(map(layout.archive_format.variant, layout.variants))
        orders = [[one.k.order for one in channels], [one.v.order for one in channels]]
        orders += [[one.argsort() for one in orders[kind]] for kind in (1, 0)]
        orders.append([codec.query_places(one.profile, layout.head_dim) for one in channels])
        order = [torch.stack(kind).to(device, torch.int32) for kind in orders]
        self.order = torch.stack(order)
        self.numbers = torch.stack([_numbers(one) for one in channels], dim=1).to(device)
        columns = [
            (chunk.offset + i, chunk.width)
            for head in layout.heads
            if head is not None
            for chunk in head.k_chunks
            for i in range(chunk.width)
        ]
        if codec.whole_channels:
            stored = torch.cat([one.k.stored for one in channels]).to(device, torch.int32)
            places = torch.tensor(columns, dtype=torch.int32, device=device).view(-1, 2)
            self.columns = torch.cat((stored[:, None], places), dim=1)
        else:
            self.columns = self.order
        self.device = Device.of(device)
        self.archive_units = sum(units)
        costs = head_costs(layout, window)
        # All of them now: while a CUDA graph is captured no tensor may come from the host.
        wave = codec.decode_shape(layout).wave
        self._work = {
            # One request, or two, have a wave each; a wave of more has programs of all of them
            # beside each other.
            programs: _share_work(
                heads, costs, programs, self.device.multiprocessors if programs >= wave else 1
            ).to(device)
            for programs in programs_of_any_few(len(layout.profiles), wave)
        }
        self._of_many = _share_work(heads, costs, len(costs), 1).to(device)

    def work(self, launch: DecodeLaunch) -> Work:
        """How a request's programs are shared out over the heads."""
        return self._work[launch.programs] if launch.few else self._of_many


def _share_work(
    heads: torch.Tensor, costs: Sequence[float], programs: int, multiprocessors: int
) -> Work:
    """Share programs out over heads of unequal cost."""
    counts = share_programs(costs, programs)
    # Heads that read most begin first. Those of a profile follow each other, so that programs that
    # run together share instructions.
    order = sorted(range(len(costs)), key=lambda head: (-costs[head], int(heads[head, 0])))
    rows: list[tuple[int, ...]] = []
    firsts = [0] * len(costs)
    for head in order:
        firsts[head] = len(rows)
        for split in range(counts[head]):
            rows.append((head, split, counts[head], len(rows), *heads[head].tolist()))
    # Of fewer programs each has a multiprocessor of its own.
    if programs > multiprocessors > 1:
        rows = [rows[i] for i in deal([row[4] for row in rows], multiprocessors)]
    of_heads = list(zip(firsts, counts, heads[:, 3].tolist(), strict=True))
    return Work(
        programs=torch.tensor(rows, dtype=torch.int32),
        heads=torch.tensor(of_heads, dtype=torch.int32),
    )


def head_costs(layout: CacheLayout, window: Window) -> list[float]:
    """What each KV head has to do in a request, as shares of its programs go by."""
    near = window.sink + window.recent
    dense = near * 2 * layout.head_dim * layout.itemsize
    far = max(NOMINAL_LENGTH, 2 * near) - near
    costs = [
        dense + far * layout.archive_format.token_bytes(profile, layout.itemsize)
        for profile in layout.profiles
    ]
    # Half of an even share on top: in short requests all heads read the same.
    return [cost + sum(costs) / len(costs) / 2 for cost in costs]


def share_programs(costs: Sequence[float], programs: int) -> list[int]:
    """Programs for each head, at least one, so that the largest share of work is smallest."""
    counts = [1] * len(costs)
    heap = [(-cost, head) for head, cost in enumerate(costs)]
    heapify(heap)
    for _ in range(programs - len(costs)):
        head = heap[0][1]
        counts[head] += 1
        heapreplace(heap, (-costs[head] / counts[head], head))
    return counts


def deal(variants: Sequence[int], multiprocessors: int) -> list[int]:
    """An order of a request's programs in which each multiprocessor gets those of one profile, as
    far as that goes: programs whose places differ by the number of multiprocessors run on the same.

    Args:
        variants: of each program, the profile of its head; 0 where its head stores nothing.
        multiprocessors: how many there are.
    """
    storing = [i for i, variant in enumerate(variants) if variant]
    runs = []
    for _, run in groupby(storing, key=lambda i: variants[i]):
        of_profile = list(run)
        # A head's last programs may have nothing to do, so they are spread out.
        columns = max(1, round(len(of_profile) * multiprocessors / len(storing)))
        runs += [i for first in range(columns) for i in of_profile[first::columns]]
    dealt, taken = [0] * len(runs), 0
    for column in range(min(multiprocessors, len(runs))):
        places = range(column, len(runs), multiprocessors)
        dealt[places.start :: multiprocessors] = runs[taken : taken + len(places)]
        taken += len(places)
    return dealt + [i for i, variant in enumerate(variants) if not variant]


def _numbers(head: HeadChannels) -> torch.Tensor:
    """One head's part of `Tables.numbers`, fp32 `[7, head_dim]`."""
    k_mean = head.k.mean.clone()
    # What is stored as it is has no use for its mean.
    k_mean[: head.k.counts[0]] = 0
    v_mean = torch.empty_like(head.v.mean)
    v_mean[head.v.order] = head.v.mean
    half = torch.zeros_like(head.k.mean)
    first = head.k.counts[0]
    for bits, count in zip(CODE_CLASSES, head.k.counts[1:], strict=True):
        half[first : first + count] = (2**bits - 1) / 2
        first += count
    means = head.k.mean, head.v.mean
    return torch.stack((k_mean, head.k.factor, v_mean, head.v.factor, *means, half))
