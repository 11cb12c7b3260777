"""Masks for tests."""

from pathlib import Path

import numpy as np
from transformers import AutoConfig

from vllm_leank.core.geometry import Geometry
from vllm_leank.mask.mask import Mask

MODEL = "tests/tiny"


def geometry_of(model: Path) -> Geometry:
    return Geometry.from_hf_config(AutoConfig.from_pretrained(model))


def full_mask(model: Path) -> Mask:
    return Mask.full(geometry_of(model), model=MODEL)


def random_mask(model: Path, counts: list[int], *, align: int = 16, seed: int = 0) -> Mask:
    """Keep random channels; `counts`, one per head, are repeated over all heads of all layers."""
    geometry = geometry_of(model)
    rng = np.random.default_rng(seed)
    keep = np.zeros((geometry.num_layers, geometry.num_kv_heads, geometry.head_dim), bool)
    for index, head in enumerate(keep.reshape(-1, geometry.head_dim)):
        head[rng.permutation(geometry.head_dim)[: counts[index % len(counts)]]] = True
    return Mask.from_keep(keep, geometry, model=MODEL, provenance={"method": "random"}, align=align)
