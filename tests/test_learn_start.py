"""`leank mask learn` from a calibrated mask, or one that is given."""

import json
import signal
import sys

import numpy as np
import pytest
import torch

from vllm_leank import cli
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.learn.data import Data, Shuffled
from vllm_leank.learn.distillation import Distiller
from vllm_leank.learn.run import learn
from vllm_leank.learn.stages import Refinement
from vllm_leank.mask.file import load_mask, save_mask
from vllm_leank.offline.calibrate_bits import measure, pruned_mask
from vllm_leank.offline.calibration_prompts import calibration_prompts
from vllm_leank.offline.mask_request import MaskRequest
from vllm_leank.offline.prompts import Sample

WINDOW = Window(32, 32)
REFINEMENT = Refinement(steps=24, lr=0.01)


@pytest.fixture(scope="module")
def samples():
    ids = np.random.default_rng(0).integers(0, 512, (4, 330)).tolist()
    return [Sample(row[:320], row[320:]) for row in ids]


@pytest.fixture(scope="module")
def jsonl(samples, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "samples.jsonl"
    lines = [{"prompt_token_ids": one.prompt, "answer_token_ids": one.answer} for one in samples]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def request_for(model, **options):
    asked = {"ratio": 0.5, "align": 16, "sink": 32, "recent": 32} | options
    return MaskRequest.open(str(model), "leank/tiny", **asked)


def run(model, jsonl, state, **options):
    recipe = options.pop("recipe", REFINEMENT)
    return learn(request_for(model), Data(jsonl), state, recipe=recipe, device="cpu", **options)


@pytest.fixture(scope="module")
def calibrated(tiny_llama_dir, jsonl):
    """What `leank mask calibrate --ratio` makes of the same prompts."""
    request = request_for(tiny_llama_dir)
    prompts = calibration_prompts(request.checkpoint, jsonl, WINDOW, max_tokens=2048)
    model = request.checkpoint.load("auto", "cpu")
    return pruned_mask(request, measure(model, prompts, WINDOW))


@pytest.fixture(scope="module")
def learned(tiny_llama_dir, jsonl, tmp_path_factory):
    return run(tiny_llama_dir, jsonl, tmp_path_factory.mktemp("whole") / "a.state")


def test_learning_starts_from_the_calibrated_mask(
    tiny_llama_dir, jsonl, calibrated, learned, tmp_path
):
    still = run(tiny_llama_dir, jsonl, tmp_path / "s", recipe=Refinement(steps=1, lr=1e-9))
    assert np.array_equal(still.mask.keep, calibrated.keep)
    assert learned.mask.statistics.same_as(calibrated.statistics)
    assert learned.mask.k_kept == calibrated.k_kept == 0.5
    assert learned.losses[0] == []
    provenance = learned.mask.provenance
    assert (provenance["method"], provenance["start"]) == ("learn", "fisher")
    assert (provenance["steps"], provenance["lr"]) == (REFINEMENT.steps, REFINEMENT.lr)
    # With its answer of 10.
    assert provenance["longest_prompt"] == provenance["calibration"]["longest_prompt"] == 330
    assert "first_stage_loss" not in provenance


def test_an_interrupted_run_goes_on_without_calibrating_again(
    tiny_llama_dir, jsonl, learned, tmp_path, monkeypatch
):
    shuffled, seen = Shuffled.__call__, []

    def interrupting(self, number):
        seen.append(number)
        if len(seen) == 7:
            signal.raise_signal(signal.SIGINT)
        return shuffled(self, number)

    monkeypatch.setattr(Shuffled, "__call__", interrupting)
    state = tmp_path / "b.state"
    with pytest.raises(UserError, match="after step 7 of 24 of stage 2"):
        run(tiny_llama_dir, jsonl, state)
    monkeypatch.setattr("vllm_leank.learn.run.by_fisher", lambda *_: pytest.fail("calibrates"))
    resumed = run(tiny_llama_dir, jsonl, state)
    assert seen == list(range(resumed.checks.steps[-1]))
    assert resumed.checks.steps == learned.checks.steps
    np.testing.assert_allclose(resumed.checks.losses, learned.checks.losses, rtol=1e-5)
    assert resumed.outcome == learned.outcome
    np.testing.assert_allclose(resumed.factors, learned.factors, atol=1e-5)
    assert np.array_equal(resumed.mask.keep, learned.mask.keep)
    assert resumed.mask.statistics.same_as(learned.mask.statistics)
    assert resumed.mask.provenance["calibration"] == learned.mask.provenance["calibration"]


def test_a_mask_as_the_start(tiny_llama_dir, jsonl, calibrated, tmp_path):
    start = tmp_path / "start.yaml"
    save_mask(calibrated, start)
    options = {"start": start, "recipe": Refinement(steps=1, lr=1e-9)}
    still = run(tiny_llama_dir, jsonl, tmp_path / "s", **options)
    assert np.array_equal(still.mask.keep, calibrated.keep)
    assert still.mask.statistics.same_as(calibrated.statistics)
    assert still.mask.provenance["start"] == "start.yaml"
    assert still.mask.provenance["start_sha256"] == load_mask(start).sha256
    with pytest.raises(UserError, match=r"with start start.yaml, not fisher; remove it"):
        run(tiny_llama_dir, jsonl, tmp_path / "s", recipe=options["recipe"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.75}, "no start for --ratio 0.75 and --align 16: it prunes 50.00% of K"),
        ({"sink": 64}, "for sink 32 and recent 32, not 64 and 32"),
        ({"from": "no.yaml"}, "no.yaml"),
        ({"reg": 0.1}, "--reg goes with --from nothing"),
        ({"text": "essay.txt", "data": None}, "--text is for the generated samples"),
        ({"lr": 0}, "above 0"),
        ({"model": None}, "name one model: leank mask learn MODEL"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_llama_dir, jsonl, calibrated, tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    save_mask(calibrated, tmp_path / "start.yaml")
    asked = {
        "model": tiny_llama_dir, "data": jsonl, "from": "start.yaml", "ratio": 0.5, "align": 16,
        "sink": 32, "recent": 32, "device": "cpu", "out": "m.yaml", "min-tokens": 400,
    } | options  # fmt: skip
    words = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    monkeypatch.setattr(sys, "argv", ["leank", "mask", "learn", *words])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["start.yaml"]


def test_a_mask_of_another_model_is_no_start(tiny_llama_dir, jsonl, repo, tmp_path):
    bits = repo / "masks/Qwen/Qwen2.5-Coder-1.5B-Instruct-4bit.yaml"
    with pytest.raises(UserError, match=r"is no start for leank/tiny: .*num_layers"):
        run(tiny_llama_dir, jsonl, tmp_path / "s", start=bits)


def test_the_second_stage_lowers_the_loss(tiny_llama_dir, jsonl, samples, calibrated, tmp_path):
    """From a mask that keeps in each head what the calibrated one prunes."""
    start = tmp_path / "start.yaml"
    bad = request_for(tiny_llama_dir).mask(
        1.0 - calibrated.keep, {"method": "test"}, calibrated.statistics
    )
    save_mask(bad, start)
    recipe = Refinement(steps=40, lr=0.02)
    learned = run(tiny_llama_dir, jsonl, tmp_path / "s", start=start, recipe=recipe)
    assert learned.outcome.startswith("kept the mask after step ")
    means = torch.tensor(calibrated.statistics.k_mean, dtype=torch.float32)
    model = request_for(tiny_llama_dir).checkpoint.load("auto", "cpu")
    distiller = Distiller(model, WINDOW, means=means)

    def cost(mask):
        keep = torch.tensor(mask.keep)
        with torch.no_grad():
            found = [distiller.loss(one, keep.float(), ~keep.any(-1)).item() for one in samples]
        return sum(found)

    assert cost(learned.mask) < 0.9 * cost(bad)
