"""Scales of K against what codes of their bits lose, and what the loss is said to be."""

import numpy as np
import pytest
import torch

from vllm_leank.core.formats.packed import LEFT, STEPS
from vllm_leank.offline.fit_scales import TOKENS, KeySample, fitted_scales
from vllm_leank.offline.quantise import decode, encode

CPU = torch.device("cpu")


def loss(values, scale, bits):
    """Mean square of what codes lose, of the variance, per channel."""
    back = decode(encode(values / scale, bits), bits) * scale
    return ((back - values).square().mean(0) / values.square().mean(0)).numpy()


@pytest.mark.parametrize("bits", STEPS)
def test_what_codes_leave_of_a_normal_distribution(bits):
    values = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(bits))
    assert loss(values, 1.0, bits) == pytest.approx(LEFT[bits], rel=0.02)


def test_channels_that_turn_get_scales_that_fit():
    """One head: normal channels, and channels that go to and fro between two ends."""
    generator = torch.Generator().manual_seed(0)
    tokens, D = 4000, 32
    angles = torch.rand(tokens, D // 2, generator=generator) * 2 * torch.pi
    normal = torch.randn(tokens, D // 2, generator=generator) * 3 + 5
    key = torch.cat((normal, 7 * angles.cos()), dim=1)
    sample = KeySample()
    for part in key.split(500):
        sample(0, 0, part[None, None], part[None, None])
    assert sample.layer(0).shape == (1, 8 * TOKENS, D)
    mean, scale = (one[None, None].double().numpy() for one in (key.mean(0), key.std(0)))
    for bits in STEPS:
        found = fitted_scales(sample, mean, scale, bits, CPU)
        before, after = (
            loss(key - key.mean(0), torch.tensor(each[0, 0], dtype=torch.float32), bits)
            for each in (scale, found)
        )
        # The ends are nearer than those of a normal distribution.
        assert (after[D // 2 :] < 0.85 * before[D // 2 :]).all()
        assert (after[: D // 2] < 1.1 * before[: D // 2]).all()


def test_a_channel_that_never_moves_keeps_its_scale():
    sample = KeySample()
    still = torch.full((1, 1, 40, 32), 3.0)
    sample(0, 0, still, still)
    mean, scale = np.full((1, 1, 32), 3.0), np.zeros((1, 1, 32))
    found = fitted_scales(sample, mean, scale, 4, CPU)
    assert np.array_equal(found, scale)
