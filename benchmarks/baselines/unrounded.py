"""A cache that rounds nothing: what a comparison shows where there is nothing to see."""

import torch

from baselines.rounded_cache import MODEL_BYTES, RoundedCache
from vllm_leank.core.geometry import Geometry


class Unrounded(RoundedCache):
    """K and V as they are, in the arithmetic of other caches."""

    name = "nothing rounded"

    def layer_bytes(self, geometry: Geometry, layer: int) -> float:
        return 2 * geometry.num_kv_heads * geometry.head_dim * MODEL_BYTES

    def round(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key.float(), value.float()
