"""Codes with gradients give back what engines read, and training mends means and scales."""

import json

import numpy as np
import pytest
import torch
from baselines.trained_codes import TrainedCodes
from mask_samples import coded_mask
from real.codes_study import main

from vllm_leank.mask.file import load_mask, save_mask
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

    right = float(loss().detach())
    with torch.no_grad():
        codes.shifts[codes.bits > 0] = 1.0
        codes.stretches[codes.bits > 0] = 0.7
    off = float(loss().detach())
    optimizer = torch.optim.Adam([codes.shifts, codes.stretches], lr=0.05)
    for _ in range(60):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss().detach()) - right < 0.2 * (off - right)


def test_the_study_judges_the_best_of_a_run(tiny_llama_dir, mask, tmp_path, monkeypatch):
    save_mask(mask, tmp_path / "given.yaml")
    ids = np.random.default_rng(0).integers(0, 512, (5, 480)).tolist()
    lines = [json.dumps({"prompt_token_ids": row}) for row in ids]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out.json"
    words = f"study --model {tiny_llama_dir} --mask given.yaml --data data.jsonl --prompts 2"
    words += f" --held-out 1 --judged 2 --steps 12 --rates 0.05 --masks trained --out {out}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", words.split())
    main()
    results = json.loads(out.read_text())
    (run,) = results["runs"]
    steps, losses = zip(*run["held_out"], strict=True)
    assert steps == (0, 2, 4, 6, 8, 10, 12)
    assert run["kept_step"] == steps[losses.index(min(losses))] > 0
    before, after = (results["kl"][name]["data"]["data"] for name in ("given", "trained at 0.05"))
    assert before["tokens"] == after["tokens"] == 2 * 64
    assert after["kl"] < before["kl"]
    found = load_mask(tmp_path / "trained/trained_0.05.yaml")
    assert np.array_equal(found.k_bits, mask.k_bits)
    assert not found.statistics.same_as(mask.statistics)
