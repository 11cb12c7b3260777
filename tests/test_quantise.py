"""Codes and what they give back."""

import numpy as np
import pytest
import torch

from vllm_leank.offline.archive import StaticArchive
from vllm_leank.offline.quantise import STEPS, decode, encode, round_trip, token_scales
from vllm_leank.offline.rope import NO_ROTATION
from vllm_leank.offline.statistics import ChannelStatistics


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_give_back_themselves(bits):
    codes = torch.arange(1 << bits, dtype=torch.uint8)
    assert torch.equal(encode(decode(codes, bits), bits), codes)
    # Evenly spaced around the mean, which no code stands for.
    values = decode(codes, bits)
    torch.testing.assert_close(values, -values.flip(0))
    torch.testing.assert_close(values.diff(), torch.full(((1 << bits) - 1,), STEPS[bits]))


@pytest.mark.parametrize(("bits", "error"), [(2, 0.1188), (4, 0.01154), (8, 0.000145)])
def test_a_normal_distribution_loses_what_it_must(bits, error):
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    found = (decode(encode(x, bits), bits) - x).square().mean().item()
    assert found == pytest.approx(error, rel=0.03)


def test_what_is_out_of_range_gets_the_outermost_codes():
    assert encode(torch.tensor([-1e9, 1e9]), 4).tolist() == [0, 15]


def test_channels_have_bits_of_their_own():
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    bits = torch.tensor([0, 2, 4, 8, 16])
    back = round_trip(x, bits)
    assert (back[:, 0] == 0).all()
    for channel, kind in enumerate([2, 4, 8], start=1):
        assert torch.equal(back[:, channel], decode(encode(x[:, channel], kind), kind))
    assert torch.equal(back[:, 4], x[:, 4])


def test_a_scale_per_token_follows_the_token():
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([0.01, 0.1, 1, 3, 30, 0])[:, None]
    bits = torch.full((64,), 4)
    bits[:8] = 0  # not stored, so it must not count
    big = x.clone()
    big[:, :8] = 1e3
    scales = token_scales(big * sizes, bits)
    torch.testing.assert_close(scales[:5] / sizes[:5], torch.ones(5, 1), atol=0.4, rtol=0)
    assert (scales > 0).all()


def test_v_scaled_per_token_loses_less_where_tokens_differ():
    zeros, ones = np.zeros((1, 2, 64)), np.ones((1, 2, 64))
    statistics = ChannelStatistics(zeros, ones, ones, zeros, ones, ones, True)
    value = torch.randn(1, 2, 50, 64, generator=torch.Generator().manual_seed(0))
    value *= torch.linspace(0.05, 5, 50)[:, None]
    four = np.full((1, 2, 64), 4, np.uint8)
    losses = []
    for per_token in (False, True):
        archive = StaticArchive(four, four, statistics, NO_ROTATION, v_token_scale=per_token)
        losses.append((archive.value(0, value) - value).square().mean().item())
    assert losses[1] < 0.2 * losses[0]


def test_whole_channels_are_as_they_were():
    zeros, ones = np.zeros((1, 2, 64)), np.ones((1, 2, 64))
    statistics = ChannelStatistics(ones, ones, ones, ones, ones, ones, True)
    whole = np.full((1, 2, 64), 16, np.uint8)
    key, value = torch.randn(2, 1, 2, 9, 64).bfloat16()
    back = StaticArchive(whole, whole, statistics, NO_ROTATION)(0, 64, key, value)
    assert torch.equal(back[0], key)
    assert torch.equal(back[1], value)
    gone = StaticArchive(zeros, zeros, statistics, NO_ROTATION)(0, 64, key, value)
    assert (gone[0] == 1).all()
    assert (gone[1] == 1).all()
