"""Attention whose far keys are scaled per channel, in plain PyTorch with gradients.

It is what a mask does to a query, without a cache that saves anything: for learning (factors
between 0 and 1) and for judging (0 and 1) masks on a model of transformers.
"""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch.utils.checkpoint import checkpoint

from vllm_leank.core.window import Window
from vllm_leank.kernels.sinks import sinks_of_rows, softmax

SCORES = 1 << 28
"""Attention scores in memory at once, 1 GiB in fp32; more queries are split into blocks."""


def far_attention(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    window: Window,
    factors: torch.Tensor | None = None,
    blind: torch.Tensor | None = None,
    scaling: float | None = None,
    sink_scores: torch.Tensor | None = None,
    means: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention `[B, T, num_heads, D]` of queries `[B, num_heads, T, D]`, computed in fp32.

    Keys and values `[B, H, S_i, D]` come in consecutive parts; the queries stand at the last T
    positions. The query at position t sees the keys `[sink, boundary(t + 1))` of `window` times
    `factors` (fp32 `[H, D]` or `[B, H, D]`; None: 1). Heads where `blind` (bool `[H]` or `[B, H]`)
    do not see them at all: a head that keeps no channel has no V of far tokens either. `scaling` is
    what logits are multiplied by (None: `D ** -0.5`), `sink_scores` `[num_heads]` are the model's
    attention sinks, if it has any. With `means` of far keys (fp32, shaped as `factors`) a factor
    says how much of a channel is the key's own; the rest is its mean, and not 0. `seen` (bool
    `[B, H, T, far]`) says which far tokens are read at all, where all queries have the same ones.

    K is never copied to be scaled: `(q * a) . k` is `q . (a * k)`. Gradients reach everything but
    `blind`. For the backward pass nothing but the arguments is kept; scores are computed again.
    """
    B, num_heads, T, _ = query.shape
    S = sum(key.shape[2] for key in keys)
    rows = max(1, SCORES // (B * num_heads * S))
    outputs = []
    for at in range(0, T, rows):
        block = query[:, :, at : at + rows]
        shown = None if seen is None else seen[:, :, at : at + rows]
        rest = (window, factors, blind, scaling, sink_scores, means, shown)
        args = (block, S - T + at, keys, values, *rest)
        if torch.is_grad_enabled():
            outputs.append(checkpoint(_attend, *args, use_reentrant=False))
        else:
            outputs.append(_attend(*args))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend(
    query: torch.Tensor,
    first: int,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    window: Window,
    factors: torch.Tensor | None,
    blind: torch.Tensor | None,
    scaling: float | None,
    sink_scores: torch.Tensor | None,
    means: torch.Tensor | None,
    seen: torch.Tensor | None,
) -> torch.Tensor:
    """`far_attention` of the queries at `first` and the positions after it."""
    B, num_heads, T, D = query.shape
    H = keys[0].shape[1]
    group = num_heads // H
    near = query.reshape(B, H, group * T, D).float() * (D**-0.5 if scaling is None else scaling)
    far = near if factors is None else near * factors.unsqueeze(-2)
    of_means = None  # what the logits of all far keys have alike
    if means is not None:
        of_means = ((near - far) * means.unsqueeze(-2)).sum(-1, keepdim=True)
    at_query = torch.arange(first, first + T, device=query.device).repeat(group)[:, None]

    # Keys that are near for every query, far for every query, and the rest.
    near_end = min(window.sink, first)
    far_end = window.boundary(first + 1) if first >= window.sink else near_end
    logits, parts = [], []
    for kind, start, end in (
        ("near", 0, near_end),
        ("far", near_end, far_end),
        ("mixed", far_end, first + T),
    ):
        for offset, key, value in _between(keys, values, start, end):
            k = key.float().transpose(-1, -2)  # [B, H, D, S]
            if kind == "near":
                scores = near @ k
            elif kind == "far":
                scores = far @ k if of_means is None else far @ k + of_means
                if blind is not None:
                    scores = scores.masked_fill(blind[..., None, None], float("-inf"))
                if seen is not None:
                    shown = seen[..., offset - near_end :][..., : key.shape[2]]
                    scores = scores.masked_fill(~shown.repeat(1, 1, group, 1), float("-inf"))
            else:
                at_key = torch.arange(offset, offset + key.shape[2], device=query.device)
                is_far = (at_key >= window.sink) & (at_key < window.boundary(at_query + 1))
                hidden = at_key > at_query
                if blind is not None:
                    hidden = hidden | (is_far & blind[..., None, None])
                scores = far @ k if of_means is None else far @ k + of_means
                scores = torch.where(is_far, scores, near @ k).masked_fill(hidden, float("-inf"))
            logits.append(scores)
            parts.append(value)
    sinks = sinks_of_rows(sink_scores, H, T)
    weights = softmax(torch.cat(logits, dim=-1), sinks)  # [B, H, group * T, S]
    shares = weights.split([value.shape[2] for value in parts], dim=-1)
    sums = (share @ value.float() for share, value in zip(shares, parts, strict=True))
    output = functools.reduce(torch.add, sums)
    return output.view(B, num_heads, T, D).transpose(1, 2).to(query.dtype)


def _between(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], start: int, end: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """First position, keys and values of each part within `[start, end)`, as views."""
    offset = 0
    for key, value in zip(keys, values, strict=True):
        low, high = max(start - offset, 0), min(end - offset, key.shape[2])
        if low < high:
            yield offset + low, key[:, :, low:high], value[:, :, low:high]
        offset += key.shape[2]
