"""vLLM's TurboQuant caches: codes of turned, normalised K, and evenly rounded V."""

import torch
from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
from vllm.v1.attention.backends.turboquant_attn import _build_hadamard

from baselines.rounded_cache import RoundedCache
from baselines.vllm_fp8 import e4m3
from vllm_leank.core.geometry import Geometry


class VllmTurboQuant(RoundedCache):
    """`--kv-cache-dtype turboquant_...` of vLLM 0.32; tables, matrix and sizes are vLLM's own.

    K is divided by its norm (fp16), turned by a Hadamard matrix and rounded to the centroids of a
    normal distribution; what they give is brought to norm 1 again where the preset says so. V is
    rounded evenly from the smallest to the largest number of a token and head, with step and
    smallest number in fp16. vLLM leaves the first two and the last two layers as they are: see
    `EndsWhole`.
    """

    def __init__(self, preset: str):
        self.preset = preset
        self.name = f"vLLM {preset}"

    def layer_bytes(self, geometry: Geometry, layer: int) -> float:
        config = TurboQuantConfig.from_cache_dtype(self.preset, geometry.head_dim)
        return geometry.num_kv_heads * config.slot_size_aligned

    def round(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = TurboQuantConfig.from_cache_dtype(self.preset, key.shape[-1])
        return _centroids(key.float(), config), _even(value.float(), config.value_quant_bits)


def _centroids(key: torch.Tensor, config: TurboQuantConfig) -> torch.Tensor:
    if config.key_fp8:
        return e4m3(key)
    matrix = _build_hadamard(config.head_dim, str(key.device))
    table = get_centroids(config.head_dim, config.centroid_bits).to(key.device).sort().values
    norm = key.norm(dim=-1, keepdim=True)
    turned = (key / (norm + 1e-8)) @ matrix
    found = table[torch.bucketize(turned, (table[:-1] + table[1:]) / 2, right=True)]
    if config.norm_correction:
        found = found * (found.square().sum(-1, keepdim=True) + 1e-16).rsqrt()
    return (found @ matrix) * norm.half().float()


def _even(value: torch.Tensor, bits: int) -> torch.Tensor:
    last = 2**bits - 1
    least, most = value.amin(-1, keepdim=True), value.amax(-1, keepdim=True)
    step = ((most - least) / last).clamp(min=1e-8)
    codes = ((value - least) / step + 0.5).floor().clamp(0, last)
    return codes * step.half().float() + least.half().float()
