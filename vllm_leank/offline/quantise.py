"""Rounding to codes of 2, 4 and 8 bits, evenly spaced around a mean that is known.

A code names the middle of a step, so that no code stands for the mean itself (midrise). Steps are
counted in standard deviations of what is left when the mean is taken off; what lies beyond the
outermost steps gets their codes.
"""

import torch

LEAST = 2.0**-24
"""Scale of a channel that never leaves its mean: everything is divided by scales."""

STEPS = {2: 0.996, 4: 0.335, 8: 1 / 24}
"""Width of a step in standard deviations: the best for a normal distribution at 2 and 4 bits."""


def encode(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, uint8, 0 to `2^bits - 1`, of `x` in standard deviations from the mean."""
    half = 1 << (bits - 1)
    return (x / STEPS[bits]).floor().clamp(-half, half - 1).add(half).to(torch.uint8)


def decode(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """What codes stand for, fp32, in standard deviations from the mean."""
    half = 1 << (bits - 1)
    return (codes.float() + (0.5 - half)) * STEPS[bits]


def round_trip(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """`x` `[..., D]` as its codes give it back; `bits` are per channel, and broadcast.

    Channels of 0 bits give 0, the mean; those of 16 are as they were.
    """
    rounded = torch.where(bits == 16, x, torch.zeros_like(x))
    for kind in STEPS:
        rounded = torch.where(bits == kind, decode(encode(x, kind), kind), rounded)
    return rounded


def token_scales(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """One scale per token `[..., 1]` in fp16: the RMS of `x` over the channels that have codes."""
    coded = ((bits > 0) & (bits < 16)).expand_as(x)
    square = (x.square() * coded).sum(-1, keepdim=True) / coded.sum(-1, keepdim=True).clamp(min=1)
    # Never 0: everything is divided by it.
    return square.sqrt().clamp(2.0**-14, 65504).half().float()
