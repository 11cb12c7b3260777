"""Pools of random pages with shuffled block tables, as decode finds them in a running server."""

from dataclasses import dataclass

import torch

from vllm_leank.bench.cases import Case
from vllm_leank.core.pages import CacheLayout, pages
from vllm_leank.core.window import GRANULE
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.channels import LayerChannels
from vllm_leank.kernels.codecs import codec_of

FILL_ITEMS = 1 << 26
"""Random numbers that are drawn at once."""

EMPTY_ITEMS = 512
"""Numbers between pages of a layer that stores nothing."""


def fill_normal(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a contiguous tensor of any floating dtype with normal numbers."""
    for part in tensor.view(-1).split(FILL_ITEMS):
        part.copy_(torch.randn(part.numel(), dtype=torch.bfloat16, device=part.device))
    return tensor


def _random(pages: torch.Tensor) -> torch.Tensor:
    """Fill a contiguous tensor of numbers, or of codes."""
    return pages.random_() if pages.dtype == torch.uint8 else fill_normal(pages)


@dataclass(frozen=True)
class Tables:
    """Block tables of all copies of a case: page 0 is nobody's, and stands for freed pages.

    Attributes:
        batches: one per copy; their pages are disjoint.
        window_pages: pages of the window pool, page 0 included.
        archive_pages: pages of the archive pool, page 0 included.
    """

    batches: list[Batch]
    window_pages: int
    archive_pages: int

    @classmethod
    def shuffled(
        cls, case: Case, layout: CacheLayout, copies: int, device: torch.device
    ) -> "Tables":
        """Tables in which every page is used once, in random order; pages as long as in `layout`,
        which may be any layer's.
        """
        window, rows = case.window, copies * case.batch
        boundary = max(window.boundary(case.length), window.sink)
        window_width = pages(case.length, layout.window_block)
        archive_width = pages(boundary, layout.archive_block)
        is_dense = torch.ones(window_width, dtype=torch.bool, device=device)
        is_dense[list(window.free_pages(case.length, 0, layout.window_block))] = False
        is_archive = torch.arange(archive_width, device=device)
        is_archive = is_archive >= window.sink // layout.archive_block
        if boundary == window.sink:
            is_archive[:] = False
        window_tables, num_window = _tables(rows, is_dense)
        archive_tables, num_archive = _tables(rows, is_archive)
        batches = [
            _batch(case, window_table, archive_table)
            for window_table, archive_table in zip(
                window_tables.split(case.batch), archive_tables.split(case.batch), strict=True
            )
        ]
        return cls(batches, num_window, num_archive)


def layer_cache(
    layout: CacheLayout,
    channels: LayerChannels,
    case: Case,
    tables: Tables,
    dtype: torch.dtype,
) -> LayerCache:
    """A layer's pages, random where a table points and NaN in page 0."""
    device = tables.batches[0].seq_lens.device
    heads, columns = len(layout.profiles), 2 * layout.head_dim
    window_shape = (tables.window_pages, heads, layout.window_block, columns)
    items = layout.archive_page_bytes // layout.archive_itemsize
    # A server's pages hold all layers, so they lie apart even for a layer that stores nothing. If
    # they did not, torch could not view them in another dtype.
    archive_shape = tables.archive_pages, items or EMPTY_ITEMS
    codec = codec_of(layout.archive_format)
    archive = _random(torch.empty(archive_shape, dtype=codec.dtype(dtype), device=device))
    cache = LayerCache(
        window_pages=fill_normal(torch.empty(window_shape, dtype=dtype, device=device)),
        archive_pages=archive[:, :items],
        layout=layout,
        heads=channels.to(device).heads,
        window=case.window,
    )
    side_bytes = layout.archive_format.side_bytes * layout.archive_block // GRANULE
    for head in layout.heads if side_bytes else ():
        if head is not None:
            count = side_bytes // codec.side_dtype.itemsize
            exponents = torch.randint(-1, 2, (tables.archive_pages, count), device=device)
            numbers = exponents.float().exp2().to(codec.side_dtype).view(torch.uint8)
            pages = cache.archive_pages.view(torch.uint8)
            pages[:, head.side_offset : head.side_offset + side_bytes] = numbers
    for pool in (cache.window_pages, cache.archive_pages):
        pool[0].view(torch.uint8).fill_(0xFF)  # NaN in every dtype
    return cache


def _batch(case: Case, window_table: torch.Tensor, archive_table: torch.Tensor) -> Batch:
    """A decode step: every request computes the token after its prompt."""
    device, starts = window_table.device, torch.arange(case.batch + 1, dtype=torch.int32)
    lengths = torch.full((case.batch,), case.length, dtype=torch.int32, device=device)
    return Batch(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        exact_until=lengths - 1,
        window_table=window_table,
        archive_table=archive_table,
        slots=torch.full((case.batch,), -1, device=device),
        in_prompt=torch.zeros(case.batch, dtype=torch.bool),
        max_query_len=1,
        max_seq_len=case.length,
    )


def _tables(rows: int, used: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A table `[rows, width]` with a page of its own wherever `used` `[width]`, 0 elsewhere; and
    the number of pages.
    """
    width = int(used.sum())
    shuffled = torch.randperm(rows * width, device=used.device).view(rows, width) + 1
    table = torch.zeros(rows, max(len(used), 1), dtype=torch.int32, device=used.device)
    table[:, : len(used)][:, used] = shuffled.int()
    return table, rows * width + 1
