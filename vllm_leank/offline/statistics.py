"""What far K and V are like, per channel: means, and what is left when the mean is taken off.

An archive knows one value of each K channel per page: the mean of K before RoPE, turned to the
middle of the page. The best such mean is that of K turned back from the middles of the pages that
tokens stand in. Where channels turn slowly it is the mean of K before RoPE; where they turn often
within a page, it is near 0, as any other value would be wrong as often as right. So the mean goes
with a length of pages. All of it comes from sums over tokens, in one pass.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import UserError
from vllm_leank.mask.statistics import Statistics
from vllm_leank.offline.rope import NO_ROTATION, Rotation

Array = npt.NDArray[np.float64]

PAGE = 128
"""Tokens for which the mean of K is turned once: what a mean was measured for, it is used with."""


def page_middles(positions: Any, page: int) -> Any:
    """The position in the middle of the page of each position."""
    return positions // page * page + page // 2


@dataclass(frozen=True)
class ChannelStatistics:
    """Means, scales and mean squares of far tokens, float64 `[L, H, D]`.

    A scale is the standard deviation around the mean that an archive uses, a square the second
    moment around 0. `k_mean` is that of K turned back from the middles of pages where
    `before_rope`, else that of K itself.
    """

    k_mean: Array
    k_scale: Array
    k_square: Array
    v_mean: Array
    v_scale: Array
    v_square: Array
    before_rope: bool

    def for_mask(self) -> Statistics:
        """What a mask file holds of them, in float16."""
        means, scales = (self.k_mean, self.v_mean), (self.k_scale, self.v_scale)
        k_mean, v_mean = (mean.astype(np.float16) for mean in means)
        # A channel that never leaves its mean has a tiny scale: everything is divided by it.
        k_scale, v_scale = (scale.clip(2.0**-14, 65504).astype(np.float16) for scale in scales)
        return Statistics(k_mean=k_mean, k_scale=k_scale, v_mean=v_mean, v_scale=v_scale)


class StatisticsMeter:
    """Adds up far K and V of any number of prompts, layer by layer; fp64 on their device.

    With `rotation` None it is not known how the model turns K, and its mean is taken after RoPE.
    """

    def __init__(self, geometry: Geometry, rotation: Rotation | None, page: int = PAGE):
        self.geometry = geometry
        self.before_rope = rotation is not None
        self.rotation = NO_ROTATION if rotation is None else rotation
        self.page = page
        self._sums: dict[int, torch.Tensor] = {}
        self._angles: dict[int, torch.Tensor] = {}
        self._count = [0] * len(geometry.layers)

    def __call__(self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add K and V `[1, H, T, D]` of the tokens from position `first` on, K after RoPE."""
        positions = torch.arange(first, first + key.shape[2], device=key.device)
        k, v = key[0].float(), value[0].float()
        cos, sin = self.rotation.tables(page_middles(positions, self.page), k.shape[-1])
        products = (k.square(), k * cos, k * sin, v, v.square())
        sums = torch.stack([one.sum(dim=1, dtype=torch.float64) for one in products])
        angles = torch.stack(
            [one.sum(dim=0, dtype=torch.float64) for one in (cos.square(), sin.square(), cos * sin)]
        )
        self._sums[layer] = self._sums.get(layer, 0) + sums
        self._angles[layer] = self._angles.get(layer, 0) + angles
        self._count[layer] += k.shape[1]

    def statistics(self) -> ChannelStatistics:
        """The statistics of everything seen.

        Raises:
            UserError: a layer was never seen, or K or V are not finite.
        """
        if not all(self._count):
            raise UserError("some layers have no far tokens, so nothing is known of them")
        layers = range(len(self.geometry.layers))
        count = torch.tensor(self._count, dtype=torch.float64)[:, None, None]
        sums = torch.stack([self._sums[layer].cpu() for layer in layers], dim=1) / count
        k_square, k_cos, k_sin, v_mean, v_square = sums  # [L, H, D] each
        k_mean = k_cos - self.rotation.partner(k_sin)
        cos2, sin2, cos_sin = (
            torch.stack([self._angles[layer].cpu() for layer in layers], dim=1)[:, :, None] / count
        )
        partner = self.rotation.partner(k_mean)
        # E[(k - m cos - p sin)^2], with m the mean and p its partner
        crossed = k_mean * k_cos + partner * k_sin
        turned = k_mean.square() * cos2 + partner.square() * sin2 + 2 * k_mean * partner * cos_sin
        k_rest = (k_square - 2 * crossed + turned).clamp(min=0)
        v_rest = (v_square - v_mean.square()).clamp(min=0)
        if not bool(torch.stack([k_rest, v_rest]).isfinite().all()):
            raise UserError("K or V has values that are not finite; try another dtype")
        return ChannelStatistics(
            k_mean=k_mean.numpy(),
            k_scale=k_rest.sqrt().numpy(),
            k_square=k_square.numpy(),
            v_mean=v_mean.numpy(),
            v_scale=v_rest.sqrt().numpy(),
            v_square=v_square.numpy(),
            before_rope=self.before_rope,
        )
