"""Bits of channels: budgets and shapes are kept, and no better allocation is missed by much."""

import itertools

import numpy as np
import pytest

from vllm_leank.errors import UserError
from vllm_leank.mask.bits import MAX_PROFILES, check_bits
from vllm_leank.offline.allocate import (
    allocate as allocate_losses,
)
from vllm_leank.offline.allocate import by_variance, class_widths, left_of, side_costs


def costs(L, H, D, seed=0):
    rng = np.random.default_rng(seed)
    return [
        np.exp(rng.normal(size=(L, H, D)) * spread + rng.normal(size=(L, H, 1)))
        for spread in (2, 1)
    ]


def allocate(k_cost, v_cost, bits, *more):
    return allocate_losses(by_variance(k_cost), by_variance(v_cost), bits, *more)


def cost_of(cost, bits):
    return float(left_of(by_variance(cost), bits).sum())


def profiles(allocation):
    both = np.stack([allocation.k_bits, allocation.v_bits], axis=2)
    counts = np.stack([(both == kind).sum(-1) for kind in (8, 4, 2)], axis=-1)
    return np.unique(counts.reshape(-1, 6), axis=0)


@pytest.mark.parametrize("shape", [(4, 3, 64), (6, 2, 128), (3, 2, 256), (2, 2, 80)])
@pytest.mark.parametrize("bits", [0.5, 1, 2, 4, 7.3])
def test_what_kernels_need_is_kept(shape, bits):
    k_cost, v_cost = costs(*shape)
    found = allocate(k_cost, v_cost, bits)
    assert found.mean_bits <= bits
    step = 256  # bits, about what one head grows by
    useful = allocate(k_cost, v_cost, 8).mean_bits  # with 80 channels, more bits for fewer are not
    assert found.mean_bits >= min(bits, useful) - step / np.prod(shape)
    assert len(profiles(found)) <= MAX_PROFILES
    check_bits(found.k_bits, found.v_bits, shape)  # as every mask's
    for cost, given in ((k_cost, found.k_bits), (v_cost, found.v_bits)):
        assert set(np.unique(given)) <= {0, 2, 4, 8}
        # Dearer channels of a head never have fewer bits.
        order = np.argsort(cost, axis=-1)
        assert (np.diff(np.take_along_axis(given, order, -1).astype(int)) >= 0).all()
    again = allocate(k_cost.copy(), v_cost.copy(), bits)
    assert np.array_equal(again.k_bits, found.k_bits)
    assert np.array_equal(again.v_bits, found.v_bits)


def test_one_head_gets_the_best_there_is():
    k_cost, v_cost = costs(1, 1, 64)
    widths = class_widths(64)
    sizes = widths @ [8, 4, 2]
    sides = [side_costs(by_variance(cost[0]), widths)[0] for cost in (k_cost, v_cost)]
    for bits in (1, 2, 4):
        found = allocate(k_cost, v_cost, bits)
        spent = round(found.mean_bits * 128)
        # Nothing that is as large is cheaper.
        best = min(
            sides[0][i] + sides[1][j]
            for i, j in itertools.product(range(len(widths)), repeat=2)
            if sizes[i] + sizes[j] <= spent
        )
        assert cost_of(k_cost, found.k_bits) + cost_of(v_cost, found.v_bits) == pytest.approx(best)


def test_few_profiles_cost_little():
    k_cost, v_cost = costs(16, 4, 128)
    for bits in (1, 2, 4):
        few, many = (
            sum(
                map(
                    cost_of,
                    (k_cost, v_cost),
                    (found.k_bits, found.v_bits),
                )
            )
            for found in (allocate(k_cost, v_cost, bits), allocate(k_cost, v_cost, bits, 99))
        )
        assert many <= few * 1.0001 <= many * 1.1


def test_bits_go_where_they_save_most():
    k_cost, v_cost = costs(4, 2, 64)
    k_cost[1] *= 1e6
    found = allocate(k_cost, v_cost, 2)
    assert found.k_bits[1].mean() > found.k_bits[[0, 2, 3]].mean() + 2


def test_costs_of_nothing_need_nothing():
    zero = np.zeros((2, 2, 64))
    assert allocate(zero, zero, 4).mean_bits == 0


@pytest.mark.parametrize("bits", [0, -1, 8.1])
def test_budgets_out_of_range_are_refused(bits):
    with pytest.raises(UserError, match="it must lie above 0"):
        allocate(*costs(1, 1, 64), bits)


def test_costs_must_be_finite():
    k_cost, v_cost = costs(1, 1, 64)
    k_cost[0, 0, 3] = np.nan
    with pytest.raises(UserError, match="not finite"):
        allocate(k_cost, v_cost, 2)
