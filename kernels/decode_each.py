"""Decode of many queries per request where each selects what it reads."""

import torch
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.decode import decode

EACH_AT_ONCE = 256
"""Queries of `decode_each` in a launch: its programs leave results for each."""


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
    start, each = int(batch.query_start_loc_cpu[0]), batch.per_query
    for first in range(0, each.num_reqs, EACH_AT_ONCE):
        last = min(first + EACH_AT_ONCE, each.num_reqs)
        part, rows = each.prepared(_queries, first, last), slice(start + first, start + last)
        decode(query[rows], output[rows], cache, part, scale, after_prompt=True)


def _queries(batch: Batch, first: int, last: int) -> Batch:
    return batch.part(first, last, 1)
