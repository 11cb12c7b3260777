"""vLLM's cache of 8-bit floats."""

import torch

from baselines.rounded_cache import RoundedCache
from vllm_leank.core.geometry import Geometry


class VllmFp8(RoundedCache):
    """`--kv-cache-dtype fp8` of vLLM: e4m3 with the scale 1.0, which it takes where a checkpoint
    has none. What is too large becomes the largest number. Some of its kernels round q as well;
    here q is as it was.
    """

    name = "vLLM fp8"

    def layer_bytes(self, geometry: Geometry, layer: int) -> float:
        return 2 * geometry.num_kv_heads * geometry.head_dim

    def round(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return e4m3(key), e4m3(value)


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest 8-bit floats, fp32; the largest one for what is larger."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.float().clamp(-largest, largest).to(torch.float8_e4m3fn).float()
