"""Decode of many queries that select what they read, a part of them at a time."""

from collections.abc import Iterator

import torch
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.decode import decode

SELECTING_AT_ONCE = 256
"""Queries at most that select at once what they read: each has scores of all segments that the
longest request may have, which no profile of memory counts."""


def _parts(count: int) -> Iterator[slice]:
    """Of so many queries those of each part. Nobody keeps what is made of one: the next one takes
    its memory, as all of a long answer, with what decode prepares, may be more than there is.
    """
    for first in range(0, count, SELECTING_AT_ONCE):
        yield slice(first, min(first + SELECTING_AT_ONCE, count))


def decode_requests(
    query: torch.Tensor, output: torch.Tensor, cache: LayerCache, batch: Batch, scale: float
) -> None:
    """`decode` of any number of requests; see there for what it takes."""
    num_reqs = min(len(query), batch.num_reqs)
    if cache.selection is None or num_reqs <= SELECTING_AT_ONCE:
        decode(query, output, cache, batch, scale)
        return
    for rows in _parts(num_reqs):
        part = batch.part(rows.start, rows.stop, 1)
        decode(query[rows], output[rows], cache, part, scale)


def decode_each(
    query: torch.Tensor, output: torch.Tensor, cache: LayerCache, batch: Batch, scale: float
) -> None:
    """Attention of all queries of some requests that come after their prompts, each for itself, as
    where segments are selected no two read the same; other outputs stay as they are.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, after RoPE.
        output: like `query`.
        cache: the layer's pages.
        batch: the requests, a part of a step.
        scale: factor of the QK product.
    """
    start, end = int(batch.query_start_loc_cpu[0]), int(batch.query_start_loc_cpu[-1])
    query, output = query[start:end], output[start:end]
    for rows in _parts(end - start):
        part = batch.queries(rows.start, rows.stop)
        decode(query[rows], output[rows], cache, part, scale, after_prompt=True)
