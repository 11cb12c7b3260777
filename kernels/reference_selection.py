"""Which far tokens queries read where segments are selected, in plain PyTorch."""

import torch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.channels import HeadChannels
from vllm_leank.kernels.reference_parts import PrunedPart

from vllm_leank.core.selection import SEGMENT, Selection
from vllm_leank.core.window import GRANULE


def hide_unselected(
    queries: torch.Tensor,
    key: torch.Tensor,
    part: PrunedPart,
    channels: HeadChannels,
    cache: LayerCache,
) -> torch.Tensor:
    """Which archived tokens queries of one KV head do not see, bool `[B, Q, archived tokens]`.

    Args:
        queries: `[B, group * Q, head_dim]`, head by head.
        key: stored channels of archived tokens, fp32 `[B, tokens, stored]`.
        part: the queries' requests, and what archived tokens they would see without selection.
        channels: the head's.
        cache: the layer's.
    """
    assert cache.selection is not None
    Q = part.queries.shape[1]
    lead = cache.layout.archive_format.lead(channels.profile)
    scores = granule_scores(queries[..., channels.k.order[:lead]], key[..., :lead])
    scores = scores.unflatten(1, (-1, Q))
    seen = torch.ones_like(scores[:, 0], dtype=torch.bool)
    if part.hidden_archived is not None:
        seen = ~part.hidden_archived[..., ::GRANULE]
    selected = select(scores, seen, cache.window.sink, cache.selection)
    return ~(seen & selected).repeat_interleave(GRANULE, dim=-1)


def granule_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The best product of each query `[..., n, lead]` with a token of each granule, `[..., n,
    granules]`, of tokens `[..., tokens, lead]` that fill granules.
    """
    return (queries @ keys.mT).unflatten(-1, (-1, GRANULE)).amax(-1)


def select(
    scores: torch.Tensor, seen: torch.Tensor, sink: int, selection: Selection
) -> torch.Tensor:
    """Which granules lie in selected segments, bool `[B, Q, granules]`.

    Args:
        scores: the best product of a query with the lead of a granule's tokens, fp32
            `[B, group, Q, granules]` from the sink on; of a query, all may have the same on top.
        seen: which granules a query sees, `[B, Q, granules]`; the first ones.
        sink: tokens of the sink.
        selection: how many segments are selected: those that come closest to what some query head
            has for its best; of those that are as close, to a 65,535th of the range, the first.
    """
    offset = sink % SEGMENT // GRANULE
    together = SEGMENT // GRANULE
    granules = scores.shape[-1]
    scores = scores.masked_fill(~seen.unsqueeze(1), -torch.inf)
    # Where nothing is seen, there is no best.
    behind = scores - scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    padding = offset, -(offset + granules) % together
    of_segments = torch.nn.functional.pad(behind.amax(1), padding, value=-torch.inf)
    of_segments = of_segments.unflatten(-1, (-1, together)).amax(-1)
    segments = (seen.sum(-1) + offset + together - 1) // together
    counts = selection.count(segments)
    order = _rounded(of_segments).sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, ranks)
    selected = (rank < counts[..., None]).repeat_interleave(together, dim=-1)
    return selected[..., offset : offset + granules]


def _rounded(scores: torch.Tensor) -> torch.Tensor:
    """Scores `[..., n]` in units of a 65,535th of their range, rounded down; of `-inf`: -1."""
    exist = scores.isfinite()
    least = scores.masked_fill(~exist, torch.inf).amin(-1, keepdim=True)
    most = scores.amax(-1, keepdim=True)
    keys = ((scores - least) * (65535 / (most - least).clamp_min(1e-30))).floor()
    return keys.masked_fill(~exist, -1)
