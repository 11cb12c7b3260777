"""The study of KL: what it writes of each cache, and what it leaves out."""

import json

import pytest
from baselines.kivi import Kivi
from byte_tokenizer import copy_with_bytes
from real import kl

from vllm_leank.mask.file import load_mask


@pytest.fixture(scope="module")
def model(tiny_llama, tmp_path_factory):
    return copy_with_bytes(tiny_llama(layers=2), tmp_path_factory.mktemp("kl") / "model")


def study(model, out, monkeypatch, *options):
    command = [
        *("kl", "--model", model, "--out", out, "--lengths", 700, "--judged", 2, "--unseen", 0),
        *("--sink", 32, "--recent", 64, "--dtype", "float32", *options),
    ]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    kl.main()
    return json.loads(out.read_text())


def test_masks_are_kept_and_judged_alike_as_files(model, tmp_path, monkeypatch):
    few = "--prompts", 2, "--max-tokens", 400, "--variants"
    kept = tmp_path / "masks"
    made = study(model, tmp_path / "made.json", monkeypatch, *few, "uniform", "--keep-masks", kept)
    names = [path.stem for path in sorted(kept.iterdir())]
    assert names == ["2_bits_everywhere", "4_bits_everywhere"]
    mask = load_mask(kept / "2_bits_everywhere.yaml")
    assert (mask.k_bits == 2).all()
    assert (mask.v_bits == 2).all()
    again = study(
        model,
        tmp_path / "again.json",
        monkeypatch,
        *few,
        "floor",
        "--masks",
        *sorted(kept.iterdir()),
    )
    found = {row["name"]: row["lengths"]["700"]["kinds seen"] for row in made["archives"]}
    rows = {row["name"]: row["lengths"]["700"]["kinds seen"] for row in again["archives"]}
    for bits in (2, 4):
        its, mine = found[f"{bits} bits everywhere"], rows[f"leank {bits}_bits_everywhere"]
        assert mine["kl"] == pytest.approx(its["kl"], rel=1e-3)
        assert mine["texts"] == 2
        assert mine["kl_by_text"] == pytest.approx(its["kl_by_text"], rel=1e-3)
        assert min(mine["kl_by_text"]) < mine["kl"] < max(mine["kl_by_text"])
    assert rows["nothing rounded"]["kl"] < rows["leank 4_bits_everywhere"]["kl"] / 10
    assert rows["leank 4_bits_everywhere"]["kl"] < rows["leank 2_bits_everywhere"]["kl"]
    with pytest.raises(SystemExit, match="has files already"):
        study(model, tmp_path / "made.json", monkeypatch, *few, "uniform", "--keep-masks", kept)


def test_a_cache_under_which_logits_are_not_finite_is_left_out_and_said(
    model, tmp_path, monkeypatch, capsys
):
    rounded = Kivi.round

    def broken(self, layer, key, value):
        keys, values = rounded(self, layer, key, value)
        return keys, values * float("nan") if self.bits == 2 else values

    monkeypatch.setattr(Kivi, "round", broken)
    few = "--prompts", 1, "--max-tokens", 400, "--variants", "kivi,floor"
    found = study(model, tmp_path / "kl.json", monkeypatch, *few)
    line = "KIVI, 2 bits: logits that are not finite with 700 tokens, left out"
    assert found["skipped"] == [line]
    assert line in capsys.readouterr().err
    lengths = {row["name"]: list(row["lengths"]) for row in found["archives"]}
    assert lengths == {"KIVI, 4 bits": ["700"], "KIVI, 2 bits": [], "nothing rounded": ["700"]}
