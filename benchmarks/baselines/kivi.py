"""KIVI: K per channel and V per token, both in groups of 32."""

from typing import ClassVar

import torch

from baselines.group_rounding import round_groups
from baselines.rounded_cache import RoundedCache
from vllm_leank.core.geometry import Geometry


class Kivi(RoundedCache):
    """KIVI (arXiv 2402.02750) as its authors' code has it.

    K is rounded in groups of 32 tokens of a channel, V in groups of 32 channels of a token, both
    asymmetrically with two fp16 numbers for each group. Up to 127 of the last tokens have K as it
    was, the last 128 V.
    """

    GROUP: ClassVar[int] = 32
    residual = 128

    def __init__(self, bits: int):
        self.bits = bits
        self.name = f"KIVI, {bits} bits"

    def layer_bytes(self, geometry: Geometry, layer: int) -> float:
        element = self.bits / 8 + 4 / self.GROUP
        return 2 * geometry.num_kv_heads * geometry.head_dim * element

    def round(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        whole = key.shape[2] // self.residual * self.residual
        keys = key.to(torch.float32, copy=True)
        keys[:, :, :whole] = round_groups(keys[:, :, :whole].mT, self.GROUP, self.bits).mT
        return keys, round_groups(value, self.GROUP, self.bits)
