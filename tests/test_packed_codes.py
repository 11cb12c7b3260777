"""Codes of 8, 4 and 2 bits by hand: which they are, where they lie, what they stand for."""

import numpy as np
import pytest
import torch
from vllm_leank.kernels.channels import layer_channels
from vllm_leank.kernels.codecs.packed import PackedCodec

CODEC = PackedCodec()


def head_of(k_bits, v_bits, mean=0.0, scale=1.0):
    bits = [np.array([row], np.uint8) for row in (k_bits, v_bits)]
    numbers = {
        f"{kind}_{name}": np.full(bits[0].shape, value, np.float16)
        for kind in "kv"
        for name, value in (("mean", mean), ("scale", scale))
    }
    return layer_channels(*bits, numbers).heads[0]


def granule(row):
    """`[1, 32, channels]`, all tokens alike."""
    return torch.tensor(row, dtype=torch.float32).expand(1, 32, -1)


def test_channels_are_ordered_by_class_and_ascend_within():
    head = head_of([0, 2, 8, 4, 2, 8], [4, 4, 0, 0, 2, 2])
    assert head.k.order.tolist() == [2, 5, 3, 1, 4, 0]
    assert head.v.order.tolist() == [0, 1, 4, 5, 2, 3]
    assert head.k.stored.tolist() == [2, 5, 3, 1, 4]
    assert head.k.factor.tolist() == pytest.approx([1 / 24, 1 / 24, 0.335, 0.996, 0.996, 0])


@pytest.mark.parametrize(
    ("bits", "step", "value", "code", "read"),
    [
        (2, 0.996, -9.0, 0, -1.5),
        (2, 0.996, -0.01, 1, -0.5),
        (2, 0.996, 0.0, 2, 0.5),
        (2, 0.996, 0.99, 2, 0.5),
        (2, 0.996, 1.0, 3, 1.5),
        (2, 0.996, 9.0, 3, 1.5),
        (4, 0.335, -9.0, 0, -7.5),
        (4, 0.335, 0.34, 9, 1.5),
        (8, 1 / 24, 0.0, 128, 0.5),
        (8, 1 / 24, -9.0, 0, -127.5),
        (8, 1 / 24, 9.0, 255, 127.5),
    ],
)
@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (-3.0, 0.5)])
def test_codes_are_steps_around_the_mean(bits, step, value, code, read, mean, scale):
    head = head_of([bits] * 64, [bits] * 64, mean, scale)
    key = granule([value * scale + mean] * 64)
    stored = CODEC.encode(key, key, head)
    repeated = sum(code << (bits * i) for i in range(8 // bits))
    assert stored.key.unique().tolist() == [repeated]
    back, _ = CODEC.decode(stored, head)
    assert back.unique().tolist() == pytest.approx([read * step * scale + mean])


@pytest.mark.parametrize(("bits", "count"), [(4, 32), (2, 64)])
def test_codes_of_a_byte_are_far_apart(bits, count):
    """Every channel has the lowest code but one, which has the highest."""
    width = count * bits // 8
    head = head_of([bits] * count, [bits] * count)
    for channel in (0, 1, width - 1, width, count - 1):
        row = [-99.0] * count
        row[channel] = 99.0
        stored = CODEC.encode(granule(row), granule(row), head)
        expected = [0] * width
        expected[channel % width] = (2**bits - 1) << (bits * (channel // width))
        assert stored.key[0, 7].tolist() == expected


def test_a_token_of_v_is_coded_in_units_of_its_size():
    head = head_of([4] * 32, [4] * 32, mean=1.0, scale=2.0)
    small = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0))
    small = small / small.square().mean(-1, keepdim=True).sqrt()
    one, large = (CODEC.encode(small, 2 * small * size + 1, head) for size in (1, 64))
    assert one.side.view(torch.float16).unique().tolist() == [1.0]
    assert large.side.view(torch.float16).unique().tolist() == [64.0]
    assert large.value.equal(one.value)
    for stored, size in ((one, 1), (large, 64)):
        _, value = CODEC.decode(stored, head)
        inside = small.abs() < 2.5
        assert ((value - 1) / (2 * size) - small)[inside].abs().max() <= 0.335 / 2 + 1e-5


def test_a_token_without_size_has_a_small_scale_and_no_nan():
    head = head_of([4] * 32, [4] * 32, mean=1.0)
    stored = CODEC.encode(granule([1.0] * 32), granule([1.0] * 32), head)
    assert stored.side.view(torch.float16).unique().tolist() == [2**-14]
    _, value = CODEC.decode(stored, head)
    assert value.unique().tolist() == pytest.approx([1.0], abs=1e-4)


def test_channels_of_no_bits_are_their_means():
    head = head_of([8] * 16 + [0] * 16, [0] * 32, mean=0.25)
    stored = CODEC.encode(granule([5.0] * 32), granule([5.0] * 32), head)
    assert (stored.key.shape[-1], stored.value.shape[-1]) == (16, 0)
    key, value = CODEC.round(granule([5.0] * 32)[0], granule([5.0] * 32)[0], head)
    assert key[0, 16:].tolist() == [0.25] * 16
    assert value.shape == (32, 32)
    assert value.unique().tolist() == [0.25]


def test_round_goes_token_by_token():
    head = head_of([2] * 64, [4] * 64)
    values = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    key, value = CODEC.round(values, values, head)
    other_key, other_value = CODEC.round(values[32:], values[32:], head)
    assert key[32:].equal(other_key)
    assert value[32:].equal(other_value)
    assert (key - values).square().mean().sqrt() < 0.37
    assert (value - values).square().mean().sqrt() < 0.12
