"""A cache that leaves the first and the last layers as they are."""

import torch

from baselines.rounded_cache import MODEL_BYTES, RoundedCache
from vllm_leank.core.geometry import Geometry

WHOLE_LAYERS = 2
"""First layers, and as many last ones: as many as vLLM's TurboQuant leaves."""


def whole_layers(num_layers: int) -> list[int]:
    """The numbers of the layers that are left; of short models half of them."""
    count = min(WHOLE_LAYERS, num_layers // 2)
    return [*range(count), *range(num_layers - count, num_layers)]


class EndsWhole(RoundedCache):
    """`cache`, but for some layers: what vLLM does with TurboQuant, and with other caches where
    `--kv-cache-dtype-skip-layers` names these. `cache` has neither sink nor residual.
    """

    def __init__(self, cache: RoundedCache, num_layers: int, name: str | None = None):
        assert (cache.sink, cache.residual) == (0, 0)
        self.cache = cache
        self.whole = frozenset(whole_layers(num_layers))
        self.name = name or f"{cache.name}, {len(self.whole)} layers whole"

    def layer_bytes(self, geometry: Geometry, layer: int) -> float:
        if layer in self.whole:
            return 2 * geometry.num_kv_heads * geometry.head_dim * MODEL_BYTES
        return self.cache.layer_bytes(geometry, layer)

    def round(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer in self.whole:
            return key.float(), value.float()
        return self.cache.round(layer, key, value)
