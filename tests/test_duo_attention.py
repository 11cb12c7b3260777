"""DuoAttention's optimisation, as masks are compared with it, and the study of streaming heads."""

import json
import re

import numpy as np
import pytest
import torch
from baselines.duo_attention import KEYS, Mixer, learned_alphas, passkey_samples, passkeys
from real import streaming_costs, streaming_study
from tiny_models import wide_llama

from vllm_leank.core.window import Window
from vllm_leank.learn.distillation import Distiller
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.compose import lowest_heads, read_streaming_heads
from vllm_leank.mask.file import load_mask
from vllm_leank.offline.prompts import Sample

WINDOW = Window(sink=32, recent=32)


@pytest.fixture
def model():
    return wide_llama()


def sample_of(number):
    rng = np.random.default_rng(number)
    return Sample(rng.integers(97, size=200).tolist(), rng.integers(97, size=24).tolist())


def test_alphas_mix_full_attention_with_that_of_the_window(model):
    mixer, sample = Mixer(model, WINDOW), sample_of(0)
    assert float(mixer.loss(sample, torch.ones(2, 2))) < 1e-10
    for blind in ([[1, 0], [0, 0]], [[1, 1], [1, 1]]):
        blind = torch.tensor(blind, dtype=torch.bool)
        expected = Distiller(model, WINDOW).loss(sample, torch.ones(2, 2, 16), blind)
        found = mixer.loss(sample, (~blind).float())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_alphas_fall_first_where_no_far_token_matters(model):
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, :32] = 0
    told = []
    progress = learned_alphas(
        model, sample_of, WINDOW, steps=12, reg=0.01,
        on_step=lambda progress: told.append(progress.step),
    )  # fmt: skip
    assert told == list(range(1, 13))
    assert lowest_heads(progress.scores(), 0.25).tolist() == [[False, False], [True, False]]
    assert progress.factors.min() < 0.9


def test_passkeys_stand_in_the_text_in_order(with_tokenizer):
    prompt, answer = passkeys(np.random.default_rng(0), 50, ["It rained. ", "He slept. "])
    keys = re.findall(r"Passkey (\d+) is: ([A-Za-z, ]+)\.", prompt)
    assert [int(number) for number, _ in keys] == list(range(1, KEYS + 1))
    assert re.findall(r"Passkey (\d+) is: ([A-Za-z, ]+)\.", answer) == keys
    source = passkey_samples(Checkpoint.open(str(with_tokenizer)), 4000, 6000)
    sample = source(0)
    assert sample == source(0)
    assert 3500 < len(sample.prompt) + len(sample.answer) <= 6000


@pytest.mark.long
def test_the_study_makes_masks_and_goes_on(with_tokenizer, tmp_path, monkeypatch, capsys):
    words = [
        "--model", str(with_tokenizer), "--out", str(tmp_path), "--shares", "0.5", "--bits", "2",
        "--lengths", "500", "--judged", "1", "--unseen", "0", "--prompts", "1",
        "--max-tokens", "640", "--steps", "1", "--train-tokens", "6000", "--device", "cpu",
    ]  # fmt: skip
    streaming_study.main(words)
    results = json.loads((tmp_path / "study.json").read_text())
    names = ["bits_2", "pruned_0.7", *(f"{kind}_{way}_0.5" for way in ("fisher", "duo")
             for kind in ("bits_2", "pruned_0.7"))]  # fmt: skip
    assert list(results["masks"]) == names
    geometry = load_mask(tmp_path / "masks/bits_2.yaml").geometry
    for way in ("fisher", "duo"):
        scores = np.array(json.loads((tmp_path / f"heads_{way}.json").read_text())["scores"])
        mask = load_mask(tmp_path / f"masks/bits_2_{way}_0.5.yaml")
        assert (mask.k_bits.any(-1) == ~lowest_heads(scores, 0.5)).all()
        assert read_streaming_heads(tmp_path / f"heads_{way}.tsv", geometry, 0.5).sum() == 2
        row = results["masks"][mask.path.stem]
        assert row["saved"] > results["masks"]["bits_2"]["saved"]
        assert row["kl"]["500"]["kinds seen"]["kl"] > 0
        assert row["capacity"][-1]["name"] == "leank"
    # What is there is not done again, a length that is new is.
    monkeypatch.setattr(streaming_costs, "measure", None)
    words[words.index("500")] = "500,560"
    streaming_study.main(words)
    after = json.loads((tmp_path / "study.json").read_text())
    assert after["heads"] == results["heads"]
    assert after["masks"]["bits_2"]["kl"].keys() == {"500", "560"}
    assert after["masks"]["bits_2"]["kl"]["500"] == results["masks"]["bits_2"]["kl"]["500"]
    assert "bits_2_duo_0.5" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="had other steps; give another --out"):
        streaming_study.main([*words, "--steps", "2"])
