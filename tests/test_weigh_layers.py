"""Layers weighed by what their archives were seen to cost, before bits are handed out again."""

from dataclasses import replace

import numpy as np
import pytest

from vllm_leank.core.window import Window
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.calibrate_bits import measure
from vllm_leank.offline.calibration_prompts import CalibrationPrompts
from vllm_leank.offline.mask_request import BitsRequest
from vllm_leank.offline.streaming import streaming_heads
from vllm_leank.offline.weigh_layers import (
    Effort,
    handed_out,
    look_at_layers,
    some_of,
    surplus,
    weighed_mask,
)

WINDOW = Window(32, 32)
EFFORT = Effort(2, 2, 32)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama_dir):
    return Checkpoint.open(str(tiny_llama_dir))


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint.load("float32", "cpu")


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(512, size=count).tolist() for count in (400, 500, 450)]


@pytest.fixture(scope="module")
def measured(model, prompts):
    return measure(model, CalibrationPrompts(prompts, {}), WINDOW)


def scaled(measured, factors):
    """Costs that are wrong by one factor per layer."""
    factors = np.array(factors)[:, None, None]
    k_losses, v_losses = (
        {bits: loss * factors for bits, loss in losses.items()}
        for losses in (measured.k_losses, measured.v_losses)
    )
    return replace(measured, k_losses=k_losses, v_losses=v_losses)


def cost(model, mask, prompts):
    """What weighing judges by."""
    samples = some_of(prompts, WINDOW, EFFORT)
    return look_at_layers(model, mask, samples, EFFORT.tokens, alone=False).together


def test_a_layer_whose_costs_say_too_little_gets_more_bits(checkpoint, model, measured, prompts):
    """The first layer is said to cost a fiftieth, until it is looked at."""
    wrong = scaled(measured, [0.02, 1])
    request = BitsRequest(checkpoint, 2, WINDOW)
    plain = weighed_mask(request, wrong, model, prompts, Effort.on("cpu"))
    assert "layer_weights" not in plain.provenance
    weighed = weighed_mask(request, wrong, model, prompts, EFFORT)
    first, second = weighed.provenance["layer_weights"]
    assert first > 3 * second
    assert weighed.k_bits[0].mean() > plain.k_bits[0].mean()
    assert 1.75 < weighed.bits <= 2
    before, after = (cost(model, mask, prompts) for mask in (plain, weighed))
    assert after < 0.9 * before


def test_the_mask_that_changes_answers_least_is_kept(checkpoint, model, measured, prompts):
    """Costs that are right: looking at layers makes nothing worse."""
    for bits in (1, 3, 4):
        request = BitsRequest(checkpoint, bits, WINDOW)
        plain = weighed_mask(request, measured, model, prompts, Effort.on("cpu"))
        weighed = weighed_mask(request, measured, model, prompts, EFFORT)
        assert cost(model, weighed, prompts) <= cost(model, plain, prompts)


def test_what_layers_cost_is_told(checkpoint, model, measured, prompts):
    few, many = (
        weighed_mask(BitsRequest(checkpoint, bits, WINDOW), measured, model, prompts, EFFORT)
        for bits in (2, 8)
    )
    seen = look_at_layers(model, few, prompts[:1], 32)
    assert seen.layers.shape == (2,)
    assert (seen.layers > 0).all()
    # Errors that are small add up.
    assert seen.together == pytest.approx(seen.layers.sum(), rel=0.5)
    assert look_at_layers(model, many, prompts[:1], 32).together < seen.together / 10


def test_what_streaming_heads_lose_counts_to_no_layer(checkpoint, model, measured, prompts):
    streaming = streaming_heads(np.array([[1.0, 4], [3, 2]]), 0.25)
    request = BitsRequest(checkpoint, 8, WINDOW, 0.25)
    mask = weighed_mask(request, replace(measured, streaming=streaming), model, prompts, EFFORT)
    assert not mask.k_bits[0, 0].any()
    assert 7.5 < mask.k_bits[~streaming.heads].mean() <= 8
    _, expected = handed_out(request, replace(measured, streaming=streaming), np.ones(2))
    _, of_all = handed_out(BitsRequest(checkpoint, 8, WINDOW), measured, np.ones(2))
    assert expected[0] < 2 * of_all[0] < measured.k_losses[0][0, 0].sum() / 10
    counted, free = (
        look_at_layers(model, mask, prompts[:1], 32, streaming=heads).layers
        for heads in (None, streaming.heads)
    )
    assert free[0] < counted[0] / 10


def test_masks_have_the_scales_that_fit_their_codes(checkpoint, model, measured, prompts):
    mask = weighed_mask(BitsRequest(checkpoint, 3, WINDOW), measured, model, prompts)
    coded = mask.k_bits > 0
    deviations = measured.statistics.k_scale.astype(np.float16)
    assert (mask.statistics.k_scale[coded] != deviations[coded]).any()
    for bits, scales in measured.k_scales.items():
        chosen = mask.k_bits == bits
        assert np.array_equal(mask.statistics.k_scale[chosen], scales[chosen].astype(np.float16))


def test_surplus():
    even = np.array([1.0, 2.0, 3.0])
    assert surplus(even, 5 * even) == pytest.approx(np.ones(3))
    assert surplus(np.zeros(3), even) == pytest.approx(np.ones(3))
    first = surplus(np.array([20.0, 1.0, 1.0]), np.ones(3))
    assert first[0] > 2
    assert (first[1:] < 0.5).all()
    # Next to nothing, or a hundredth of that: neither says anything.
    slight = surplus(np.array([1.0, 1e-4, 1e-6]), np.array([1.0, 1e-4, 1e-4]))
    assert slight[2] == pytest.approx(slight[1], rel=0.01)


def test_prompts_are_taken_evenly_where_they_have_far_tokens():
    prompts = [list(range(count)) for count in (80, 200, 201, 202, 203, 204)]
    window, effort = Window(32, 32), Effort(1, 3, 32)
    assert [len(one) for one in some_of(prompts, window, effort)] == [200, 202, 204]
    assert [len(one) for one in some_of(prompts[:2], window, effort)] == [200]
    assert some_of(prompts[:1], window, effort) == []
