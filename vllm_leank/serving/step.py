"""One layer's part of a step: store the new tokens, compact what left the window, attend."""

from collections.abc import Callable
from functools import cache as memo
from typing import Any

import torch

from vllm_leank.kernels import reference
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.sinks import tokens_share


def attend_layer(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    cache: LayerCache,
    batch: Batch,
    scale: float,
) -> None:
    """Take a step's tokens into a layer's pages and write their attention to `output`.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, after RoPE.
        key: `[num_tokens, num_kv_heads, head_dim]`.
        value: like `key`.
        output: like `query`.
        cache: the layer's pages.
        batch: the step's requests, those with one token first.
        scale: factor of the QK product.
    """
    if query.is_cuda:
        _attend_gpu(query, key, value, output, cache, batch, scale)
        return
    reference.store(key, value, cache, batch)
    reference.compact(cache, batch)
    reference.attend(query, output, cache, batch, scale)


def _attend_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    cache: LayerCache,
    batch: Batch,
    scale: float,
) -> None:
    kernels, decodes = _kernels(), batch.decodes
    if batch.max_query_len <= 1:
        kernels.update(key, value, cache, batch)
        kernels.decode(query, output, cache, batch, scale)
        return
    kernels.store(key, value, cache, batch)
    kernels.compact(cache, batch)
    if batch.num_decodes < batch.num_reqs:
        if cache.window.exact:
            # First all of these queries as if they belonged to the prompt, then, again, those that
            # do not: only the device knows which. Few steps have any.
            attend_exact(query, output, cache, batch.extends, scale)
        kernels.extend(query, output, cache, batch.extends, scale)
    if decodes.num_reqs:
        kernels.decode(query, output, cache, decodes, scale)


@memo
def _kernels() -> Any:
    """Imported late: on CPU there is nothing that Triton could compile for."""
    from vllm_leank.kernels import gpu

    return gpu


def attend_exact(
    query: torch.Tensor, output: torch.Tensor, cache: LayerCache, batch: Batch, scale: float
) -> None:
    """Dense causal attention of some requests' queries over window pages; as `attend_layer`."""
    flash_attention, version = _flash_attention()
    tokens = slice(int(batch.query_start_loc_cpu[0]), int(batch.query_start_loc_cpu[-1]))
    # [num_blocks, 32, num_kv_heads, head_dim] each
    key, value = cache.window_pages.transpose(1, 2).chunk(2, dim=-1)
    sink_scores = cache.sink_scores
    found = flash_attention(
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
        fa_version=version,
        return_softmax_lse=sink_scores is not None,
    )
    if sink_scores is not None:
        # FlashAttention 3 would take them itself, but 2 knows none.
        lse = found[1]  # [num_heads, num_tokens]
        output[tokens].mul_(tokens_share(lse.T, sink_scores)[..., None])


@memo
def _flash_attention() -> tuple[Callable[..., Any], int]:
    """vLLM's FlashAttention and its version: 3 on Hopper, 2 on other GPUs."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    return flash_attn_varlen_func, 3 if is_fa_version_supported(3) else 2
