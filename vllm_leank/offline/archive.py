"""What an archive gives back of far K and V: codes around means, in plain PyTorch."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_leank.mask.bits import BitsArray
from vllm_leank.offline.quantise import LEAST, round_trip, token_scales
from vllm_leank.offline.rope import NO_ROTATION, Rotation
from vllm_leank.offline.statistics import PAGE, ChannelStatistics, page_middles


@dataclass(frozen=True)
class StaticArchive:
    """An archive whose bits, means and scales are fixed per channel; bits are uint8 `[L, H, D]`.

    Channels of 16 bits are as they were, those of 0 bits are their mean: of K the one before RoPE,
    turned by `rotation` to the middle of each page of `page` tokens (None: the mean after RoPE).
    With `v_token_scale`, V has one fp16 scale per token and head, too.
    """

    k_bits: BitsArray
    v_bits: BitsArray
    statistics: ChannelStatistics
    rotation: Rotation | None
    page: int = PAGE
    v_token_scale: bool = False

    def __call__(
        self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[B, H, T, D]` of the tokens from `first` on, as the archive gives them back."""
        return self.key(layer, first, key), self.value(layer, value)

    def key(self, layer: int, first: int, key: torch.Tensor) -> torch.Tensor:
        """K after RoPE, as it is given back."""
        rotation = self.rotation or NO_ROTATION
        positions = torch.arange(first, first + key.shape[2], device=key.device)
        mean = row(self.statistics.k_mean[layer], key)
        turned = rotation.forward(mean, page_middles(positions, self.page))
        bits = row(self.k_bits[layer], key)
        scale = row(_positive(self.statistics.k_scale[layer]), key)
        rest = key.float() - turned
        back = turned + round_trip(rest / scale, bits) * scale
        return torch.where(bits == 16, key, back.to(key.dtype))

    def value(self, layer: int, value: torch.Tensor) -> torch.Tensor:
        """V, as it is given back."""
        mean = row(self.statistics.v_mean[layer], value)
        bits = row(self.v_bits[layer], value)
        scale = row(_positive(self.statistics.v_scale[layer]), value)
        rest = (value.float() - mean) / scale
        of_token = token_scales(rest, bits) if self.v_token_scale else 1.0
        back = mean + round_trip(rest / of_token, bits) * of_token * scale
        return torch.where(bits == 16, value, back.to(value.dtype))


def row(of_layer: npt.NDArray[np.generic], like: torch.Tensor) -> torch.Tensor:
    """What is known of a layer's channels `[H, D]`, as fp32 `[H, 1, D]` where `like` lies."""
    return torch.tensor(of_layer, dtype=torch.float32, device=like.device)[:, None]


def _positive(scale: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Scales to divide by."""
    return np.maximum(scale, LEAST)
