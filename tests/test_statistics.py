"""Means and scales in one pass against what all tokens together give."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import UserError
from vllm_leank.offline.archive import StaticArchive
from vllm_leank.offline.rope import rotation_of
from vllm_leank.offline.statistics import StatisticsMeter, page_middles

GEOMETRY = Geometry(2, 3, 32, 1e4, {"partial_rotary_factor": 0.5})
PAGE = 64


def far_tokens(T, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(2, 2, 1, 3, 1, 32, generator=generator) + 0.1
    mean = torch.randn(2, 2, 1, 3, 1, 32, generator=torch.Generator().manual_seed(7)) * 2
    parts = mean + spread * torch.randn(2, 2, 1, 3, T, 32, generator=generator)
    positions = torch.arange(64, 64 + T)
    parts[:, 0] = rotation_of(GEOMETRY).forward(parts[:, 0], positions)
    return parts


def measured(rotation):
    meter = StatisticsMeter(GEOMETRY, rotation, page=PAGE)
    prompts = [far_tokens(200, 0), far_tokens(333, 1)]
    for parts in prompts:
        for layer, (key, value) in enumerate(parts):
            meter(layer, 64, key, value)
    return meter.statistics(), prompts


@pytest.mark.parametrize("turned", [True, False])
def test_sums_give_what_all_tokens_give(turned):
    rotation = rotation_of(GEOMETRY) if turned else None
    found, prompts = measured(rotation)
    assert found.before_rope == turned
    for layer in range(2):
        positions = [torch.arange(64, 64 + parts.shape[4]) for parts in prompts]
        keys = torch.cat([parts[layer, 0, 0] for parts in prompts], dim=1).double()
        values = torch.cat([parts[layer, 1, 0] for parts in prompts], dim=1).double()
        at = torch.cat(positions)
        before = rotation.back(keys, page_middles(at, PAGE)) if turned else keys
        mean = before.mean(dim=1, keepdim=True)
        turned_mean = rotation.forward(mean, page_middles(at, PAGE)) if turned else mean
        k_scale = (keys - turned_mean).square().mean(dim=1).sqrt()
        expected = {
            "k_mean": mean[:, 0],
            "k_scale": k_scale,
            "k_square": keys.square().mean(dim=1),
            "v_mean": values.mean(dim=1),
            "v_scale": values.std(dim=1, correction=0),
            "v_square": values.square().mean(dim=1),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(
                getattr(found, name)[layer], value.numpy(), rtol=1e-4, atol=1e-4
            )


def test_the_mean_before_rope_leaves_less_than_another_and_than_none():
    before, after = (measured(rotation)[0] for rotation in (rotation_of(GEOMETRY), None))

    def of_pairs(values):
        return values.reshape(2, 3, 4, 8)[:, :, :2].sum(axis=2)  # 16 channels turn, i with i + 8

    left = of_pairs(before.k_scale**2)
    assert (left <= of_pairs(before.k_square)).all()
    assert left.sum() < 0.8 * of_pairs(after.k_scale**2).sum()


def test_an_archive_loses_what_the_scale_says():
    rotation = rotation_of(GEOMETRY)
    found, prompts = measured(rotation)
    bits = np.zeros((2, 3, 32), np.uint8)
    archive = StaticArchive(bits, bits, found, rotation, page=PAGE)
    losses = torch.zeros(2, 3, 32)
    for parts in prompts:
        for side, back in enumerate(archive(1, 64, *parts[1])):
            losses[side] += (back - parts[1, side]).square().sum(dim=(0, 2))
    losses /= sum(parts.shape[4] for parts in prompts)
    np.testing.assert_allclose(losses[0].sqrt().numpy(), found.k_scale[1], rtol=1e-3)
    np.testing.assert_allclose(losses[1].sqrt().numpy(), found.v_scale[1], rtol=1e-3)


def test_masks_hold_them_in_half_precision():
    found, _ = measured(rotation_of(GEOMETRY))
    held = found.for_mask()
    for name in ("k_mean", "k_scale", "v_mean", "v_scale"):
        np.testing.assert_allclose(getattr(held, name), getattr(found, name), rtol=1e-3, atol=1e-6)
    never_moves = replace(found, v_scale=np.zeros_like(found.v_scale)).for_mask()
    assert (never_moves.v_scale > 0).all()


def test_pages_have_their_middle():
    assert page_middles(torch.tensor([0, 127, 128, 300]), 128).tolist() == [64, 64, 192, 320]


def test_layers_without_far_tokens_are_refused():
    with pytest.raises(UserError, match="no far tokens"):
        StatisticsMeter(GEOMETRY, None).statistics()
