"""Calibration on GPUs: one, or a model whose layers lie on several."""

import numpy as np
import pytest
import torch

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import ALL_GPUS, Checkpoint
from vllm_leank.offline.calibrate import measure_heads
from vllm_leank.offline.calibrate_bits import measure
from vllm_leank.offline.calibration_prompts import CalibrationPrompts
from vllm_leank.offline.rope import rotation_of_model

WINDOW = Window(32, 32)


@pytest.fixture
def checkpoint(tiny_llama_dir):
    return Checkpoint.open(str(tiny_llama_dir))


@pytest.fixture
def prompts():
    rng = np.random.default_rng(0)
    return CalibrationPrompts([rng.integers(512, size=n).tolist() for n in (400, 500)], {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_all_gpus_are_refused_where_there_are_none(checkpoint):
    with pytest.raises(UserError, match="all GPUs, and torch sees none"):
        checkpoint.place(ALL_GPUS)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", ALL_GPUS])
def test_gpus_measure_what_the_cpu_does(checkpoint, prompts, device):
    if device == ALL_GPUS and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    placed = checkpoint.place(device)
    assert placed == device
    model = checkpoint.load("float32", placed)
    if device == ALL_GPUS:
        assert len({weight.device for weight in model.parameters()}) > 1
    assert rotation_of_model(model) is not None
    found = measure(model, prompts, WINDOW)
    heads = measure_heads(model, prompts.ids, WINDOW)
    on_cpu = checkpoint.load("float32", "cpu")
    expected = measure(on_cpu, prompts, WINDOW)
    expected_heads = measure_heads(on_cpu, prompts.ids, WINDOW)
    for name in ("k_mean", "k_scale", "v_mean", "v_scale"):
        one, other = (getattr(each.statistics, name) for each in (found, expected))
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    # A label that falls to the next token changes a few gradients.
    for one, other in (
        (found.k_losses[2], expected.k_losses[2]),
        (found.v_losses[2], expected.v_losses[2]),
    ):
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.99
    np.testing.assert_allclose(heads.far_mass, expected_heads.far_mass, rtol=1e-3)
