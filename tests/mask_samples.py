"""Masks for tests."""

from pathlib import Path

import numpy as np
from transformers import AutoConfig

from vllm_leank.core.geometry import Geometry
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.statistics import Statistics

MODEL = "tests/tiny"


def geometry_of(model: Path) -> Geometry:
    return Geometry.from_hf_config(AutoConfig.from_pretrained(model))


def full_mask(model: Path) -> Mask:
    return Mask.full(geometry_of(model), model=MODEL)


def random_mask(model: Path, counts: list[int], *, align: int = 16, seed: int = 0) -> Mask:
    """Keep random channels; `counts`, one per head, are repeated over all heads of all layers."""
    geometry = geometry_of(model)
    rng = np.random.default_rng(seed)
    keep = np.zeros(geometry.shape, bool)
    for index, head in enumerate(keep.reshape(-1, geometry.head_dim)):
        head[rng.permutation(geometry.head_dim)[: counts[index % len(counts)]]] = True
    return Mask.from_keep(keep, geometry, model=MODEL, provenance={"method": "random"}, align=align)


def statistics_of(shape: tuple[int, int, int], seed: int = 0) -> Statistics:
    """Random means and scales."""
    rng = np.random.default_rng(seed)

    def scales() -> np.ndarray:
        return rng.uniform(0.1, 4, shape).astype(np.float16)

    def means() -> np.ndarray:
        return rng.normal(size=shape).astype(np.float16)

    return Statistics(means(), scales(), means(), scales())


def bits_mask(geometry: Geometry, bits: int, model: str) -> Mask:
    """All channels of so many bits."""
    shape = geometry.shape
    same = np.full(shape, bits, np.uint8)
    return Mask.from_bits(
        same, same, geometry, model=model, provenance={"method": "even"},
        statistics=statistics_of(shape),
    )  # fmt: skip


def coded_mask(model: Path, seed: int = 0) -> Mask:
    """Heads of 8, 4 and 2 bits, of V alone and of none in turn; 64 channels or a multiple."""
    heads = [
        ([8] * 16 + [4] * 32 + [0] * 16, [4] * 32 + [0] * 32),
        ([2] * 64, [2] * 64),
        ([0] * 64, [0] * 64),
        ([4] * 64, [8] * 32 + [4] * 32),
    ]
    geometry = geometry_of(model)
    rng = np.random.default_rng(seed)
    shape = geometry.shape
    bits = np.zeros((2, *shape), np.uint8)
    rows = bits.reshape(2, -1, geometry.head_dim)
    for index in range(rows.shape[1]):
        for row, classes in zip(rows[:, index], heads[(index + seed) % len(heads)], strict=True):
            row[:] = rng.permutation(np.repeat(classes, geometry.head_dim // 64))
    means = (rng.normal(0, 0.3, (2, *shape))).astype(np.float16)
    scales = (rng.uniform(0.5, 1.5, (2, *shape))).astype(np.float16)
    statistics = Statistics(means[0], scales[0], means[1], scales[1])
    provenance = {"method": "random"}
    return Mask.from_bits(
        *bits, geometry, model=MODEL, provenance=provenance, statistics=statistics
    )


def packed_mask(geometry: Geometry, seed: int = 0, **options: object) -> Mask:
    """Heads of 2, 4 and 8 bits, of 16 bits and of none in turn, their channels in random order.

    Heads have 128 channels or a multiple.
    """
    heads = [
        ([8] * 32 + [4] * 32 + [2] * 64, [4] * 64 + [2] * 64),
        ([0] * 64 + [4] * 64, [8] * 128),
        ([16] * 32 + [0] * 96, [16] * 128),
        ([0] * 128, [0] * 128),
    ]
    rng = np.random.default_rng(seed)
    shape = geometry.shape
    bits = np.zeros((2, *shape), np.uint8)
    rows = bits.reshape(2, -1, geometry.head_dim)
    for index in range(rows.shape[1]):
        for row, classes in zip(rows[:, index], heads[index % len(heads)], strict=True):
            row[:] = rng.permutation(np.repeat(classes, geometry.head_dim // 128))
    return Mask.from_bits(
        *bits,
        geometry,
        **{
            "model": MODEL,
            "provenance": {"method": "random"},
            "statistics": statistics_of(shape, seed),
        }
        | options,
    )
