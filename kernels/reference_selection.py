"""Which far tokens queries read where segments are selected, in plain PyTorch."""

import torch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.channels import HeadChannels
from vllm_leank.kernels.head_pages import HeadPages
from vllm_leank.kernels.reference_parts import PrunedPart

from vllm_leank.core.selection import SEGMENT, Selection
from vllm_leank.core.window import GRANULE


def hide_unselected(
    queries: torch.Tensor,
    pages: HeadPages,
    part: PrunedPart,
    channels: HeadChannels,
    cache: LayerCache,
) -> torch.Tensor:
    """Which archived tokens queries of one KV head do not see, bool `[B, Q, archived tokens]`.

    Args:
        queries: `[B, group * Q, head_dim]`, scaled, head by head.
        pages: the head's.
        part: the queries' requests, and what archived tokens they would see without selection.
        channels: the head's.
        cache: the layer's.
    """
    assert cache.selection is not None
    assert part.archive_pages is not None
    B, rows, D = queries.shape
    Q = part.queries.shape[1]
    summaries = pages.read_summaries(part.archive_pages, part.granules).unflatten(0, (B, -1))
    scores = cache.codec.score(
        queries.view(B, rows // Q, Q, D).transpose(1, 2), summaries, channels
    )
    seen = torch.ones_like(scores, dtype=torch.bool)
    if part.hidden_archived is not None:
        seen = ~part.hidden_archived[..., ::GRANULE]
    selected = select(scores, seen, cache.window.sink, cache.selection)
    return ~(seen & selected).repeat_interleave(GRANULE, dim=-1)


def select(
    scores: torch.Tensor, seen: torch.Tensor, sink: int, selection: Selection
) -> torch.Tensor:
    """Which granules lie in selected segments, bool `[..., granules]`.

    Args:
        scores: of granules from the sink on, fp32 `[..., granules]`.
        seen: which of them a query sees, like `scores`; the first ones.
        sink: tokens of the sink.
        selection: how many segments are selected: those with the best granules, of those that score
            alike, to a 65,535th of the range, the first.
    """
    offset = sink % SEGMENT // GRANULE
    together = SEGMENT // GRANULE
    granules = scores.shape[-1]
    scores = scores.masked_fill(~seen, -torch.inf)
    padding = offset, -(offset + granules) % together
    of_segments = torch.nn.functional.pad(scores, padding, value=-torch.inf)
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
