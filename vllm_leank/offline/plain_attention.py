"""Attention as models have it, with nothing pruned."""

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention

from vllm_leank.kernels.sinks import with_sink_token


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    sink_scores: torch.Tensor | None,
) -> torch.Tensor:
    """Attention `[B, T, num_heads, D]` of queries `[B, num_heads, T, D]`, with gradients.

    Keys and values are `[B, H, S, D]`; `attention_mask`, bool, broadcasts to `[B, num_heads, T, S]`
    (None: causal, with the queries at the last T positions). `scaling` is what logits are
    multiplied by (None: `D ** -0.5`), `sink_scores` `[num_heads]` are attention sinks, if any.
    """
    D = query.shape[-1]
    scaling = D**-0.5 if scaling is None else scaling
    if sink_scores is not None:
        query, key, value = with_sink_token(query, key, value, sink_scores, scaling)
        attention_mask = None if attention_mask is None else pad(attention_mask, (1, 0), value=True)
    if attention_mask is None:
        attention_mask = causal_lower_right(query.shape[2], key.shape[2])
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return output[..., :D].transpose(1, 2).contiguous()
