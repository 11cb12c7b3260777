"""Summaries of granules of packed K, by which segments are selected, in plain PyTorch.

A byte per channel says of a granule's 32 codes what their mean is, and their variance. If a query's
products with 32 tokens were normally distributed, the logarithm of the mean of their exponentials
were mean + variance / 2; that of a sum over channels is taken as if these did not depend on each
other. Both come from sums of whole numbers, so that all devices write the same bytes.
"""

import torch
from vllm_leank.kernels.channels import Channels

from vllm_leank.core.formats.packed import CODE_CLASSES, MEAN_STEP, STEPS, VARIANCE_STEP
from vllm_leank.core.window import GRANULE


def mean_factor(bits: int) -> float:
    """From twice the sum of a granule's distances from the middle code to codes of its mean."""
    return STEPS[bits] / (2 * GRANULE * MEAN_STEP)


def variance_factor(bits: int) -> float:
    """From 32 times the sum of squares less the square of the sum to codes of the variance."""
    return STEPS[bits] ** 2 / (GRANULE**2 * VARIANCE_STEP)


def summary_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Summaries uint8 `[n, channels]` of int32 codes `[n, 32, channels]` of so many bits."""
    total, squares = codes.sum(-2, dtype=torch.int32), codes.square().sum(-2, dtype=torch.int32)
    # The floor comes before the sum: no device can then fuse product and sum.
    mean = (2 * total - GRANULE * (2**bits - 1)).float() * mean_factor(bits)
    mean = (mean.floor() + 8).clamp(0, 15).to(torch.uint8)
    variance = (GRANULE * squares - total.square()).float() * variance_factor(bits)
    return mean | variance.floor().clamp(0, 15).to(torch.uint8) << 4


def score_summaries(
    queries: torch.Tensor, summaries: torch.Tensor, channels: Channels
) -> torch.Tensor:
    """See `Codec.score`. What all granules have in common is left out."""
    count = summaries.shape[-1]
    scale = channels.factor[:count] / _steps_of(channels)[:count]
    queries = queries[..., channels.order[:count]] * scale
    means, variances = (summaries & 15).float(), (summaries >> 4).float()
    return (
        queries.sum(-2) @ (means * MEAN_STEP).mT
        + queries.square().sum(-2) @ (variances * (VARIANCE_STEP / 2)).mT
    )


def _steps_of(channels: Channels) -> torch.Tensor:
    """The step of each stored channel's class."""
    steps = [
        channels.factor.new_full((count,), STEPS[bits])
        for bits, count in zip(CODE_CLASSES, channels.counts[1:], strict=True)
    ]
    return torch.cat(steps)
