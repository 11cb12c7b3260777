"""Masks of `leank mask learn` are judged on held-out samples, and the best is what it hands out."""

import json
import signal

import numpy as np
import pytest
import torch

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.learn.checks import Checks, served_loss
from vllm_leank.learn.data import Data, Shuffled, without_held_out
from vllm_leank.learn.distillation import Distiller
from vllm_leank.learn.run import learn
from vllm_leank.learn.stages import Refinement, Stage
from vllm_leank.learn.state import State
from vllm_leank.mask.file import load_mask, save_mask
from vllm_leank.offline.mask_request import MaskRequest
from vllm_leank.offline.prompts import Sample

WINDOW = Window(32, 32)
RATE = 0.02


def checks_of(*losses):
    checks = Checks()
    for number, loss in enumerate(losses):
        checks.add(25 * number, loss, np.full((1, 1, 16), float(number)))
    return checks


def test_the_best_is_the_first_with_the_lowest_loss():
    checks = checks_of(3.0, 2.0, 1.0, 1.0, 4.0)
    assert (checks.best_index, checks.without_gain) == (2, 2)
    assert (checks.best == 2).all()
    assert checks_of(1.0, 1.0).best_index == 0
    assert Checks().without_gain == 0


def test_what_came_of_it_is_said_in_a_sentence():
    better = checks_of(0.08218, 0.0812, 0.0707, 0.0901).outcome("the calibrated one")
    assert better == (
        "kept the mask after step 50: loss on held-out samples 0.0707, 0.08218 before learning; "
        "step 75, the last, had 0.0901"
    )
    assert checks_of(2.0, 1.0).outcome("that of a.yaml") == (
        "kept the mask after step 25: loss on held-out samples 1, 2 before learning"
    )
    assert checks_of(1.0, 3.0, 2.0).outcome("that of a.yaml") == (
        "learning did not help: loss on held-out samples 1 before it, at best 2 after step 50; the "
        "mask is that of a.yaml"
    )


@pytest.mark.parametrize(
    ("steps", "checked"), [(150, [0, 25, 50, 75, 100, 125, 150]), (8, [0, 2, 4, 6, 8]), (1, [0, 1])]
)
def test_masks_are_judged_at_the_ends_and_six_times_at_most(steps, checked):
    stage = Stage(steps, 0.1, 0)
    assert [step for step in range(steps + 1) if stage.is_checked(step)] == checked
    assert len(stage.checked_steps) == len(checked) - 1


def test_a_quarter_is_held_out_by_the_seed():
    samples = [Sample([i], [i]) for i in range(12)]
    taught, held_out = without_held_out(samples, seed=0)
    assert (len(taught), len(held_out)) == (9, 3)
    assert sorted(taught + held_out) == samples
    assert without_held_out(samples, seed=0) == (taught, held_out)
    assert any(without_held_out(samples, seed)[1] != held_out for seed in range(1, 4))
    many = [Sample([i], [i]) for i in range(100)]
    assert len(without_held_out(many, seed=0)[1]) == 8
    assert len(without_held_out(samples[:2], seed=0)[1]) == 1
    with pytest.raises(UserError, match="only one sample has far tokens, and one is held out"):
        without_held_out(samples[:1], seed=0)


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "samples.jsonl"
    ids = np.random.default_rng(0).integers(0, 512, (8, 170)).tolist()
    lines = [{"prompt_token_ids": row[:160], "answer_token_ids": row[160:]} for row in ids]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def request_for(model):
    return MaskRequest.open(str(model), "leank/tiny", ratio=0.5, align=16, sink=32, recent=32)


@pytest.fixture(scope="module")
def bad(tiny_llama_dir, tmp_path_factory):
    """A mask by chance, which learning betters; pruned channels are 0."""
    path = tmp_path_factory.mktemp("bad") / "bad.yaml"
    scores = np.random.default_rng(1).random((2, 2, 64))
    save_mask(request_for(tiny_llama_dir).mask(scores, {"method": "random"}), path)
    return path


def run(model, jsonl, state, start, *, steps=24, lr=RATE, **options):
    recipe = Refinement(steps=steps, lr=lr)
    options = {"recipe": recipe, "start": start, "device": "cpu"} | options
    return learn(request_for(model), Data(jsonl), state, **options)


@pytest.fixture(scope="module")
def bettered(tiny_llama_dir, jsonl, bad, tmp_path_factory):
    return run(tiny_llama_dir, jsonl, tmp_path_factory.mktemp("whole") / "a.state", bad)


@pytest.fixture(scope="module")
def held_out_loss(tiny_llama_dir, jsonl):
    """Measures a mask anew: its loss on what is held out."""
    checkpoint = request_for(tiny_llama_dir).checkpoint
    _, held_out, _ = Data(jsonl).open(checkpoint, WINDOW, seed=0)
    distiller = Distiller(checkpoint.load("auto", "cpu"), WINDOW)
    assert len(held_out) == 2
    return lambda mask: served_loss(distiller, mask.keep, held_out)


def test_the_mask_handed_out_is_the_best_of_those_judged(bettered, bad, held_out_loss):
    checks = bettered.checks
    assert checks.steps == [0, 4, 8, 12, 16, 20, 24]
    assert held_out_loss(bettered.mask) == pytest.approx(min(checks.losses), rel=1e-4)
    assert min(checks.losses) < 0.9 * checks.losses[0]
    told = bettered.mask.provenance
    assert told["held_out_loss_before"] == pytest.approx(checks.losses[0], abs=1e-6)
    assert told["held_out_loss"] == pytest.approx(min(checks.losses), abs=1e-6)
    assert (told["kept_step"], told["last_step"]) == (checks.steps[checks.best_index], 24)
    assert bettered.outcome.startswith(f"kept the mask after step {told['kept_step']}: ")


def test_learning_that_gains_nothing_ends_early_and_leaves_the_mask_as_it_was(
    tiny_llama_dir, jsonl, bad, tmp_path, monkeypatch, capsys
):
    """So slow that no channel changes sides: all checks find the same."""
    slow = {"steps": 18, "lr": 1e-9, "patience": 2}
    found = run(tiny_llama_dir, jsonl, tmp_path / "s", bad, **slow)
    assert found.checks.steps == [0, 3, 6]
    assert len(set(found.checks.losses)) == 1
    assert len(found.losses[1]) == 6
    assert np.array_equal(found.mask.keep, load_mask(bad).keep)
    assert found.mask.provenance["kept_step"] == 0
    assert found.outcome.startswith("learning did not help: loss on held-out samples ")
    assert found.outcome.endswith("; the mask is that of bad.yaml")
    early = "stage 2: ended early, after step 6 of 18, as nothing was gained"
    assert early in " ".join(capsys.readouterr().err.split())
    # More patience goes on where it ended; as much of it says the same again.
    seen, shuffled = [], Shuffled.__call__
    monkeypatch.setattr(
        Shuffled, "__call__", lambda self, number: seen.append(number) or shuffled(self, number)
    )
    again = run(tiny_llama_dir, jsonl, tmp_path / "s", bad, **slow)
    assert (again.mask.sha256, seen) == (found.mask.sha256, [])
    more = run(tiny_llama_dir, jsonl, tmp_path / "s", bad, **slow | {"patience": 3})
    assert (more.checks.steps, seen) == ([0, 3, 6, 9], [6, 7, 8])


def test_an_interrupted_run_is_judged_as_if_it_were_whole(
    tiny_llama_dir, jsonl, bad, bettered, tmp_path, monkeypatch
):
    shuffled, seen = Shuffled.__call__, []

    def interrupting(self, number):
        seen.append(number)
        if len(seen) in (6, 8):  # between two checks, and at one
            signal.raise_signal(signal.SIGINT)
        return shuffled(self, number)

    monkeypatch.setattr(Shuffled, "__call__", interrupting)
    state = tmp_path / "s"
    for step in (6, 8):
        with pytest.raises(UserError, match=f"after step {step} of 24 of stage 2"):
            run(tiny_llama_dir, jsonl, state, bad)
    resumed = run(tiny_llama_dir, jsonl, state, bad, save_steps=3)
    assert seen == list(range(24))
    assert resumed.checks.steps == bettered.checks.steps
    np.testing.assert_allclose(resumed.checks.losses, bettered.checks.losses, rtol=1e-5)
    assert np.array_equal(resumed.mask.keep, bettered.mask.keep)
    assert resumed.outcome == bettered.outcome


def test_an_older_best_outlives_an_interruption(tiny_llama_dir, jsonl, bad, tmp_path):
    """What a state has of the best is what is handed out, whatever the last factors are."""
    state = tmp_path / "s"
    whole = run(tiny_llama_dir, jsonl, state, bad, steps=2)
    kept = State.resume(state, *settings_of(state), "cpu")
    assert kept.checks.steps == whole.checks.steps
    other = np.random.default_rng(2).random((2, 2, 64))
    kept.checks.best[:] = other
    kept.save(state)
    found = run(tiny_llama_dir, jsonl, state, bad, steps=2)
    assert np.array_equal(
        found.mask.keep, request_for(tiny_llama_dir).mask(other, {"method": "x"}).keep
    )


def settings_of(state):
    from safetensors import safe_open

    with safe_open(state, "pt") as file:
        settings = json.loads(file.metadata()["settings"])
    return settings["first"], settings["second"]


def test_a_loss_that_is_not_finite_is_said(tiny_llama_dir, jsonl):
    checkpoint = request_for(tiny_llama_dir).checkpoint
    distiller = Distiller(checkpoint.load("auto", "cpu"), WINDOW)
    distiller.model.model.norm.weight.data[3] = torch.inf
    _, held_out, _ = Data(jsonl).open(checkpoint, WINDOW, seed=0)
    with pytest.raises(UserError, match="loss on held-out samples is not finite"):
        served_loss(distiller, np.ones((2, 2, 64), bool), held_out)
