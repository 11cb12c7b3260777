"""One layer's part of a step: store the new tokens, compact what left the window, attend."""

from functools import cache as memo
from typing import Any

import torch

from vllm_leank.kernels import reference
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.serving.flash import attend_exact, attend_pruned


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
        kernels.decode_requests(query, output, cache, batch, scale)
        return
    kernels.store(key, value, cache, batch)
    kernels.compact(cache, batch)
    if batch.num_decodes < batch.num_reqs:
        if cache.window.exact:
            # First all of these queries as if they belonged to the prompt, then, again, those that
            # do not: only the device knows which. Few steps have any.
            attend_exact(query, output, cache, batch.extends, scale)
        if cache.selection is None:
            attend_pruned(query, output, cache, batch.extends, scale)
        elif batch.extends.replayed:
            kernels.decode_each(query, output, cache, batch.extends, scale)
    if decodes.num_reqs:
        kernels.decode_requests(query, output, cache, decodes, scale)


@memo
def _kernels() -> Any:
    """Imported late: on CPU there is nothing that Triton could compile for."""
    from vllm_leank.kernels import gpu

    return gpu
