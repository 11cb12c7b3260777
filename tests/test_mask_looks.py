"""`leank mask plot` and `leank mask heads`: frequencies, outliers, ranks and pictures."""

import json
import sys

import numpy as np
import pytest
from mask_samples import packed_mask

from vllm_leank import cli
from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import UserError
from vllm_leank.mask.compose import read_streaming_heads
from vllm_leank.mask.file import save_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.rope_pairs import (
    channel_pairs,
    high_frequency_share,
    outlier_pairs,
    pair_shares,
    wavelengths,
)

GEOMETRY = Geometry(2, 2, 64, 1e4, None)


def test_pairs_are_half_a_head_apart():
    assert channel_pairs(GEOMETRY)[:2].tolist() == [[0, 32], [1, 33]]
    assert len(channel_pairs(GEOMETRY)) == 32
    partial = Geometry(2, 2, 64, 1e4, {"rope_type": "default", "partial_rotary_factor": 0.5})
    assert channel_pairs(partial)[-1].tolist() == [15, 31]
    assert wavelengths(partial)[0] == pytest.approx(2 * np.pi)
    assert wavelengths(partial)[8] == pytest.approx(2 * np.pi * 100)
    with pytest.raises(UserError, match="no RoPE"):
        channel_pairs(Geometry(2, 2, 64, None, None))


def test_shares_of_pairs():
    keep = np.zeros((2, 2, 64), bool)
    keep[:, 0, [0, 33]] = True
    keep[0, 1, 1] = True
    assert pair_shares(keep, GEOMETRY)[:3].tolist() == [0.25, 0.375, 0]


@pytest.mark.parametrize(
    ("shares", "outliers"),
    [
        ([0.1, 0.1, 0.4, 0.1, 0.1], [2]),
        ([0.1, 0.1, 0.4, 0.1, 0.3], []),
        ([0.3, 0.05, 0.06, 0.05, 0.3], [0, 4]),
        ([0.01, 0.01, 0.09, 0.01], []),
        ([0.5, 0.5, 0.7, 0.5, 0.5], []),
        ([0.5], []),
    ],
)
def test_outliers_stand_out_from_both_sides(shares, outliers):
    assert outlier_pairs(np.array(shares)) == outliers


def test_high_frequency_share_is_energy_in_the_faster_half():
    energy = np.zeros((1, 3, 64))
    energy[0, 0, [15, 32]] = [1, 2]
    energy[0, 1, [15, 16, 63]] = [1, 2, 1]
    assert high_frequency_share(energy, Geometry(1, 3, 64, 1e4, None)).tolist() == [[1, 0.25, 1]]


@pytest.fixture
def leank(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["leank", "mask", *map(str, args)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capsys.readouterr()
        return exit_info.value.code or 0, out, err

    return call


def save(path, geometry=GEOMETRY):
    keep = np.zeros((2, 2, 64), bool)
    keep[..., [4, 36, *range(20, 32), *range(46, 64)]] = True
    mask = Mask.from_keep(keep, geometry, model="m", provenance={"method": "by hand"})
    save_mask(mask, path)
    return path


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
def test_plot(leank, tmp_path, suffix, start):
    picture = tmp_path / f"m{suffix}"
    code, out, _ = leank("plot", save(tmp_path / "m.yaml"), "--out", picture)
    assert code == 0
    assert picture.read_bytes().startswith(start)
    assert "fastest quarter of the pairs: 12.5%, 12.5%, 75.0%, 100.0%" in out
    assert "pair 4 (turns once in 20 tokens) stands out: 100.0% kept, 0.0% to 0.0%" in out


def test_plot_of_bits(leank, tmp_path):
    save_mask(packed_mask(Geometry(2, 2, 128, 1e4, None)), tmp_path / "m.yaml")
    code, out, _ = leank("plot", tmp_path / "m.yaml", "--out", tmp_path / "m.png")
    assert code == 0
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert "bits of K by RoPE frequency, from the fastest quarter of the pairs: " in out


def test_plot_without_rope(leank, tmp_path):
    path = save(tmp_path / "m.yaml", Geometry(2, 2, 64, None, None))
    code, out, _ = leank("plot", path, "--out", tmp_path / "m.png")
    assert code == 0
    assert "no RoPE" in out


def test_plot_refuses_before_it_draws(leank, tmp_path, monkeypatch):
    path = save(tmp_path / "m.yaml")
    for out, message in ((path, "exists already"), (tmp_path / "m.bmp", ".png, .svg, .pdf")):
        code, _, err = leank("plot", path, "--out", out)
        assert code == 2
        assert message in err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = leank("plot", path, "--out", tmp_path / "m.png")
    assert code == 2
    assert "pip install matplotlib" in err


def test_heads_are_ranked_and_written_for_compose(leank, tiny_llama_dir, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        # Head 1 of layer 0 gets loud in its fastest pair, head 0 of layer 1 in its slowest.
        for layer, head, channels in ((0, 1, [0, 32]), (1, 0, [31, 63])):
            model.model.layers[layer].self_attn.k_proj.weight[
                [64 * head + c for c in channels]
            ] *= 50
    model.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt_token_ids": np.random.default_rng(i).integers(0, 512, 80).tolist()} for i in (0, 1)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["heads", "--model", tmp_path / "model", "--data", tmp_path / "p.jsonl"]
    code, out, _ = leank(*options, "--device", "cpu", "--json", "--out", tmp_path / "heads.tsv")
    assert code == 0
    ranked = [(head["layer"], head["head"]) for head in json.loads(out)]
    assert (ranked[0], ranked[-1]) == ((0, 1), (1, 0))
    assert json.loads(out)[0]["share"] > 0.9
    streaming = read_streaming_heads(tmp_path / "heads.tsv", GEOMETRY, share=0.25)
    assert streaming.tolist() == [[False, True], [False, False]]
    code, out, _ = leank(*options, "--device", "cpu", "--top", "2")
    assert code == 0
    assert "2 more heads, down to" in out
