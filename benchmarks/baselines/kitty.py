"""Kitty: 2 bits, and 4 for the largest K channels of each page."""

from typing import ClassVar

import torch

from baselines.group_rounding import round_groups
from baselines.rounded_cache import RoundedCache
from vllm_leank.core.geometry import Geometry


class Kitty(RoundedCache):
    """Kitty (arXiv 2511.18643) as its authors' simulation has it.

    The first 32 tokens are as they were. K is rounded per channel in pages of 128 tokens; the
    channels with the largest mean absolute value of a page, an eighth, get 4 bits, others 2. V has
    2 bits, in groups of 128 channels of a token. Rounding is KIVI's. Of each page a byte per
    channel says where it lies.
    """

    PAGE: ClassVar[int] = 128
    sink = 32
    residual = PAGE
    name = "Kitty, 2 bits, an eighth of K at 4"

    def layer_bytes(self, geometry: Geometry, layer: int) -> float:
        D = geometry.head_dim
        of_key = D * (2 * 7 / 8 + 4 / 8) / 8 + (4 + 1) * D / self.PAGE
        of_value = D * 2 / 8 + 4 * D / min(D, self.PAGE)
        return geometry.num_kv_heads * (of_key + of_value)

    def round(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        whole = key.shape[2] // self.PAGE * self.PAGE
        keys = key.to(torch.float32, copy=True)
        pages = keys[:, :, :whole].mT.unflatten(-1, (-1, self.PAGE))  # [B, H, D, pages, 128]
        sizes = pages.abs().mean(-1)
        best = sizes.topk(sizes.shape[2] // 8, dim=2).indices
        bits = torch.full_like(sizes, 2).scatter(2, best, 4)[..., None]
        keys[:, :, :whole] = round_groups(pages.flatten(-2), self.PAGE, bits).mT
        return keys, round_groups(value, min(value.shape[-1], self.PAGE), 2)
