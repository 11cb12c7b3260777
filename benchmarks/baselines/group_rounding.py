"""Asymmetric rounding in groups: a group's smallest number is code 0, its largest the last code."""

import torch

LEAST_RANGE = 1e-4
"""Of a group: everything is divided by its step."""


def round_groups(x: torch.Tensor, size: int, bits: int | torch.Tensor) -> torch.Tensor:
    """`x` `[..., n]` as codes give it back, fp32, in groups of `size` along the last dimension.

    A group has its step and its smallest number in fp16. `bits` is a number or
    `[..., n / size, 1]`.
    """
    groups = x.float().unflatten(-1, (-1, size))
    least = groups.amin(-1, keepdim=True)
    most = groups.amax(-1, keepdim=True)
    last = 2.0 ** torch.as_tensor(bits, device=x.device) - 1
    step = ((most - least).clamp(min=LEAST_RANGE) / last).half().float().clamp(min=2.0**-24)
    least = least.half().float()
    codes = ((groups - least) / step).round().clamp(min=torch.zeros_like(last), max=last)
    return (codes * step + least).flatten(-2)
