"""Scales of K that fit its codes better than standard deviations do.

Steps of codes are those that lose least where numbers are normally distributed. Channels of K often
are not: one that RoPE turns between two ends spends most of its time near them, and never goes
beyond. So the scale of each channel is tried shorter and longer on a sample of far tokens, with the
bits that it got, and the one that loses least is kept. That costs nothing while serving.

V stays with its standard deviations: its tokens bring scales of their own, and little is won.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from vllm_leank.core.formats.packed import STEPS
from vllm_leank.offline.quantise import LEAST, decode, encode

Array = npt.NDArray[np.float64]

TOKENS = 128
"""Of a prompt that are kept, evenly spread over its far ones."""

MARGIN = 1.25
"""Codes of 8 bits have steps so small that the ends decide: they reach so much further than the
furthest token of the sample, as others will lie beyond it."""

FACTORS = tuple(1.1**power for power in range(-10, 8))
"""Of standard deviations, that are tried: from 0.39 to 1.95."""


@dataclass
class KeySample:
    """Keeps some far K of each prompt, in its own dtype on the CPU."""

    _kept: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def __call__(self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take from K `[1, H, T, D]` of the tokens from position `first` on; V is not looked at."""
        places = np.linspace(0, key.shape[2] - 1, min(TOKENS, key.shape[2])).round().astype(int)
        some = key[0][:, torch.as_tensor(places, device=key.device)]
        self._kept.setdefault(layer, []).append(some.cpu())

    def layer(self, layer: int) -> torch.Tensor:
        """What was kept of a layer, fp32 `[H, tokens, D]`."""
        return torch.cat(self._kept[layer], dim=1).float()


def fitted_scales(
    sample: KeySample, mean: Array, scale: Array, bits: int, device: torch.device
) -> Array:
    """Scales of K, `[L, H, D]`, that codes of so many bits around `mean` lose least with, tried on
    `device`.
    """
    fitted = np.empty_like(scale)
    for layer in range(len(scale)):
        middle, of_layer = (
            torch.tensor(one[layer], dtype=torch.float32, device=device)[:, None]
            for one in (mean, scale)
        )
        rest = sample.layer(layer).to(device) - middle
        fitted[layer] = scale[layer] * _best_factors(rest / of_layer.clamp(min=LEAST), bits)
    return fitted


def _best_factors(deviations: torch.Tensor, bits: int) -> Array:
    """The factor `[H, D]` of each channel's scale that codes of `deviations` `[H, tokens, D]` lose
    least with; the one next to 1 of equally good ones.
    """
    factors = sorted(FACTORS, key=lambda factor: abs(np.log(factor)))
    losses = torch.stack(
        [
            (decode(encode(deviations / factor, bits), bits) * factor - deviations).square().mean(1)
            for factor in factors
        ]
    )
    if bits == 8:
        tried = torch.tensor(factors, device=deviations.device)[:, None, None]
        short = tried * STEPS[bits] * 2 ** (bits - 1) < MARGIN * deviations.abs().amax(dim=1)
        losses[short & (tried < 1)] = torch.inf
    found: Array = np.array(factors)[losses.argmin(dim=0).cpu().numpy()]
    return found
