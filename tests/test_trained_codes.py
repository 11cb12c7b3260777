"""Codes with gradients give back what engines read, and training mends means and scales."""

import pytest
import torch
from baselines.trained_codes import TrainedCodes
from mask_samples import coded_mask

from vllm_leank.offline.served_archive import ServedArchive


@pytest.fixture
def mask(tiny_llama_dir):
    return coded_mask(tiny_llama_dir)


@pytest.fixture
def far(mask):
    """K and V `[1, H, 64, D]` of layer 0, as spread as the mask says."""
    codes = TrainedCodes(mask, torch.device("cpu"))
    torch.manual_seed(0)
    row = lambda known, kind: known[kind, 0][None, :, None]  # noqa: E731
    return [
        row(codes.mean, kind) + torch.randn(1, 2, 64, 64) * row(codes.scale, kind)
        for kind in range(2)
    ]


def test_codes_give_back_what_engines_read(mask, far):
    served = ServedArchive(mask)
    found = TrainedCodes(mask, torch.device("cpu"))(0, 32, *far)
    stores = ~served.blind[0]
    for left, right in zip(served(0, 32, *far), found, strict=True):
        torch.testing.assert_close(left[:, stores], right[:, stores], atol=1e-5, rtol=1e-5)


def test_training_mends_means_and_scales_that_are_off(mask, far):
    codes = TrainedCodes(mask, torch.device("cpu"))

    def loss():
        found = codes(0, 32, *far)
        return sum((one - two).square().mean() for one, two in zip(far, found, strict=True))

    right = float(loss())
    with torch.no_grad():
        codes.shifts[codes.bits > 0] = 1.0
        codes.stretches[codes.bits > 0] = 0.7
    off = float(loss())
    optimizer = torch.optim.Adam([codes.shifts, codes.stretches], lr=0.05)
    for _ in range(60):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss()) - right < 0.2 * (off - right)
    written, given = codes.statistics(), mask.statistics
    near = abs(written.k_mean[0] - given.k_mean[0]) < 0.5 * given.k_scale[0]
    assert near.mean() > 0.9
