"""Attention sinks: one more score of each query head in every softmax, learned with the model, to
which no token belongs. What a query gives to it is lost to its tokens.

Not the sink of the window, which is a request's first tokens.
"""

import torch
import torch.nn.functional as F

CHANNELS = 8
"""What a sink's token adds to the size of heads, of which it uses one: attention on a GPU wants a
multiple."""


def tokens_share(lse: torch.Tensor, sink_scores: torch.Tensor) -> torch.Tensor:
    """The share of a query's weights that is left for tokens, fp32, if their scores have the
    log-sum-exp `lse`. Shapes broadcast.
    """
    return torch.sigmoid(lse.float() - sink_scores.float())


def softmax(scores: torch.Tensor, sink_scores: torch.Tensor | None) -> torch.Tensor:
    """Weights of tokens from their scores, fp32 `[..., S]`, beside sinks that broadcast to
    `[..., 1]`; None: there are none.
    """
    weights = scores.softmax(-1)
    if sink_scores is None:
        return weights
    return weights * tokens_share(scores.logsumexp(-1, keepdim=True), sink_scores)


def sinks_of_rows(
    sink_scores: torch.Tensor | None, num_kv_heads: int, queries: int
) -> torch.Tensor | None:
    """Sinks `[num_heads]` as `[num_kv_heads, group * queries, 1]`, where the queries of all heads
    of a group follow each other, head by head; None: there are none.
    """
    if sink_scores is None:
        return None
    return sink_scores.repeat_interleave(queries).view(num_kv_heads, -1, 1)


def with_sink_token(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sink_scores: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What to give to an attention that knows no sinks: q, K and V with one more token, before all
    others and seen by all, whose scores are the sinks and whose V is 0.

    Heads become larger by `CHANNELS`: the first channels of the output are those of before, and
    `scale` must be given to that attention as well.

    Args:
        query: `[..., num_heads, T, D]`.
        key: `[..., H, S, D]`.
        value: like `key`.
        sink_scores: `[num_heads]`.
        scale: factor of the QK product.
    """
    D = query.shape[-1]
    query, key, value = (
        F.pad(query, (0, CHANNELS)),
        F.pad(key, (0, CHANNELS, 1, 0)),
        F.pad(value, (0, CHANNELS, 1, 0)),
    )
    query[..., D] = (sink_scores.float() / scale)[:, None]
    key[..., 0, D] = 1
    return query, key, value
