"""What vLLM's FlashAttention computes of a step: prompts that are read exactly, and far tokens that
were unpacked for many queries.
"""

from collections.abc import Callable
from functools import cache as memo
from typing import Any

import torch

from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.pieces import cut, share_out
from vllm_leank.kernels.scratch import UNPACKED_QUERIES, UNPACKED_TOKENS
from vllm_leank.kernels.sinks import tokens_share


def attend_exact(
    query: torch.Tensor, output: torch.Tensor, cache: LayerCache, batch: Batch, scale: float
) -> None:
    """Dense causal attention of some requests' queries over window pages; as `attend_layer`."""
    tokens = _tokens(batch)
    # [num_blocks, window_block, num_kv_heads, head_dim] each
    key, value = cache.window_pages.transpose(1, 2).chunk(2, dim=-1)
    sink_scores = cache.sink_scores
    found = _attend(
        q=query[tokens],
        k=key,
        v=value,
        out=output[tokens],
        cu_seqlens_q=batch.local_query_start_loc,
        max_seqlen_q=batch.max_query_len,
        seqused_k=batch.seq_lens,
        max_seqlen_k=batch.max_seq_len,
        block_table=batch.window_table,
        softmax_scale=scale,
        causal=True,
        return_softmax_lse=sink_scores is not None,
    )
    if sink_scores is not None:
        # FlashAttention 3 would take them itself, but 2 knows none.
        lse = found[1]  # [num_heads, num_tokens]
        output[tokens].mul_(tokens_share(lse.T, sink_scores)[..., None])


def attend_pruned(
    query: torch.Tensor, output: torch.Tensor, cache: LayerCache, batch: Batch, scale: float
) -> None:
    """Attention of many queries per request to what each of them sees; as `kernels.extend`. Where
    that is quicker, far tokens are unpacked for FlashAttention, and `extend` reads the rest.
    """
    from vllm_leank.kernels import gpu as kernels

    scratch, window = cache.scratch, cache.window
    far = window.boundary(batch.max_seq_len) - window.sink
    if scratch is None or batch.max_query_len < UNPACKED_QUERIES or far < UNPACKED_TOKENS:
        kernels.extend(query, output, cache, batch, scale)
        return
    queries = kernels.piece_queries(cache, query.shape[1])
    regions = scratch.regions(batch.num_reqs, far)
    for part in batch.prepared(share_out, regions.requests):
        pieces = part.prepared(cut, window, queries, regions, scratch.page, far)
        tokens = _tokens(part)
        lse = None
        for i, seen in enumerate(pieces.seen):
            kernels.unpack(cache, part, regions, i * regions.tokens)
            found = output[tokens]
            if lse is not None:
                assert scratch.results is not None
                found = scratch.results[: len(found)]
            _, found_lse = _attend(
                q=query[tokens],
                k=scratch.key,
                v=scratch.value,
                out=found,
                cu_seqlens_q=pieces.query_start_loc,
                max_seqlen_q=min(queries, part.max_query_len),
                seqused_k=seen,
                max_seqlen_k=regions.tokens,
                block_table=pieces.block_table,
                softmax_scale=scale,
                causal=False,
                return_softmax_lse=True,
            )
            if lse is not None:
                found_lse = kernels.merge(output[tokens], lse, found, found_lse, cache)
            lse = found_lse
        kernels.extend(query, output, cache, part, scale, lse)


def _tokens(batch: Batch) -> slice:
    """The rows of a batch's queries."""
    return slice(int(batch.query_start_loc_cpu[0]), int(batch.query_start_loc_cpu[-1]))


def _attend(**arguments: Any) -> Any:
    flash_attention, version = _flash_attention()
    return flash_attention(**arguments, fa_version=version)


@memo
def _flash_attention() -> tuple[Callable[..., Any], int]:
    """vLLM's FlashAttention and its version: 3 on Hopper, 2 on other GPUs."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    return flash_attn_varlen_func, 3 if is_fa_version_supported(3) else 2
