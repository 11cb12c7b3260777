"""A cache that leaves the first and the last layers as they are."""

import torch

from baselines.rounded_cache import RoundedCache
from baselines.unrounded import Unrounded
from vllm_leank.core.geometry import Geometry

WHOLE_LAYERS = 2
"""First layers, and as many last ones: as many as vLLM's TurboQuant leaves."""

ENDS = "ends"
"""What asks for it behind a cache's name, and ends the names of files."""


def whole_layers(num_layers: int) -> list[int]:
    """The numbers of the layers that are left; of short models half of them."""
    count = min(WHOLE_LAYERS, num_layers // 2)
    return [*range(count), *range(num_layers - count, num_layers)]


def whole_name(name: str, layers: int = 2 * WHOLE_LAYERS) -> str:
    """What tables call a cache that leaves so many layers."""
    return f"{name}, {layers} layers whole"


class EndsWhole(RoundedCache):
    """`cache`, but for some layers: what vLLM does with TurboQuant, and with other caches where
    `--kv-cache-dtype-skip-layers` names these. `cache` has neither sink nor residual.
    """

    def __init__(self, cache: RoundedCache, num_layers: int, name: str | None = None):
        assert (cache.sink, cache.residual) == (0, 0)
        self.cache = cache
        self.whole = frozenset(whole_layers(num_layers))
        self.name = name or whole_name(cache.name, len(self.whole))

    def layer_bytes(self, geometry: Geometry, layer: int) -> float:
        return self._of(layer).layer_bytes(geometry, layer)

    def round(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._of(layer).round(layer, key, value)

    def _of(self, layer: int) -> RoundedCache:
        return Unrounded() if layer in self.whole else self.cache
