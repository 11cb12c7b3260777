"""Queries of requests in pieces, each of which reads the far tokens that its first query sees."""

from dataclasses import dataclass

import torch
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.scratch import Regions

from vllm_leank.core.window import Window


@dataclass(frozen=True)
class Pieces:
    """Pieces of some requests' queries, as FlashAttention takes sequences; int32 tensors.

    Attributes:
        query_start_loc: `[pieces + 1]`, first query of each, counted from the first request's.
        seen: for each part of the far tokens, `[pieces]`: how many of the part's tokens all queries
            of a piece see.
        block_table: `[pieces, pages of a region]`, pages of the piece's request in the scratch.
    """

    query_start_loc: torch.Tensor
    seen: tuple[torch.Tensor, ...]
    block_table: torch.Tensor


def share_out(batch: Batch, requests: int) -> tuple[Batch, ...]:
    """The requests of a batch, so many at once; those without queries are left out."""
    if requests >= batch.num_reqs:
        return (batch,)
    parts = []
    for first in range(0, batch.num_reqs, requests):
        last = min(first + requests, batch.num_reqs)
        longest = int(batch.query_start_loc_cpu[first : last + 1].diff().max())
        if longest:
            parts.append(batch.part(first, last, longest))
    return tuple(parts)


def cut(
    batch: Batch, window: Window, queries: int, regions: Regions, page: int, far: int
) -> Pieces:
    """Cut each request's queries into pieces; the device is not waited for.

    Args:
        batch: requests that have room in the scratch at once.
        window: the dense window.
        queries: queries of a piece.
        regions: how the requests share the scratch.
        page: tokens of a page of it.
        far: most far tokens of a request: parts are counted up to there.
    """
    start = batch.local_query_start_loc
    device, counts = start.device, start.diff()
    pieces = _pieces(counts, queries)
    total = int(_pieces(batch.query_start_loc_cpu.diff(), queries).sum())
    row = torch.arange(batch.num_reqs, device=device).repeat_interleave(pieces, output_size=total)
    first_piece = pieces.cumsum(0) - pieces
    first = (torch.arange(total, device=device) - first_piece[row]) * queries
    position = (batch.seq_lens - counts)[row] + first
    sees = window.boundary(position + 1) - window.sink
    table = torch.arange(regions.tokens // page, device=device)
    return Pieces(
        torch.cat((start[row] + first, start[-1:])).int(),
        tuple(
            (sees - begin).clamp(0, regions.tokens).int() for begin in range(0, far, regions.tokens)
        ),
        (row[:, None] * len(table) + table).int(),
    )


def _pieces(counts: torch.Tensor, queries: int) -> torch.Tensor:
    return (counts + queries - 1) // queries
