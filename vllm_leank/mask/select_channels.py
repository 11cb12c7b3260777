"""From a score per channel to the channels that are kept."""

import numpy as np
import numpy.typing as npt


def select_channels(
    scores: npt.NDArray[np.float64], ratio: float, align: int
) -> npt.NDArray[np.bool_]:
    """Keep the best channels of all heads together, in groups of `align` per head.

    `scores` is `[L, H, D]`, finite; `ratio` in [0, 1] is the share of channels to prune. The result
    is bool `[L, H, D]`.

    The rule is stage 2 of LeanK: channels above one global threshold survive, and a head with `c`
    survivors keeps `floor((c + align/2) / align) * align` channels, its best first. With the
    threshold at the quantile `ratio`, rounding moves the share that is kept; here the threshold is
    the one that keeps `1 - ratio` of all channels, to the nearest group.

    A head keeps its group number m (from 0) as soon as its channel of rank `m*align + align/2`
    survives. So a group is worth the score of that channel, and the best groups are kept. Ties go
    to the lower layer, head and channel.
    """
    num_layers, num_heads, head_dim = scores.shape
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=-1)
    group_scores = ranked[..., align // 2 - 1 :: align].reshape(-1)

    num_groups = round((1 - ratio) * scores.size / align)
    best = np.argsort(-group_scores, kind="stable")[:num_groups]
    heads = best // (head_dim // align)
    counts = np.bincount(heads, minlength=num_layers * num_heads) * align

    return _best(order, counts.reshape(num_layers, num_heads))


def round_survivors(
    factors: npt.NDArray[np.float64], ratio: float, align: int
) -> npt.NDArray[np.bool_]:
    """Stage 2 of LeanK to the letter: the channels that its training would deploy.

    `factors` is `[L, H, D]`, finite and not negative; `ratio` in [0, 1] is the quantile of all
    factors below which channels are pruned. A head with `c` channels at the threshold or above
    keeps `floor((c + align/2) / align) * align`, its largest factors first, ties to the lower
    channel. Channels of factor 0 never count: training ran without them. The result is bool
    `[L, H, D]`; the share that it prunes may differ from `ratio` by what rounding moves.
    """
    survivors = ((factors >= np.quantile(factors, ratio)) & (factors > 0)).sum(axis=-1)
    order = np.argsort(-factors, axis=-1, kind="stable")
    return _best(order, (survivors + align // 2) // align * align)


def _best(order: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """The first `counts` `[L, H]` channels of each head in `order` `[L, H, D]`."""
    keep = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(keep, order, np.arange(order.shape[-1]) < counts[..., None], axis=-1)
    return keep
