"""`leank mask learn`: the two stages, interrupted runs, other ratios, and what is refused."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from byte_tokenizer import copy_with_bytes

from vllm_leank import cli
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.learn.checks import Checks, served_loss
from vllm_leank.learn.data import Data, Shuffled
from vllm_leank.learn.distillation import Distiller
from vllm_leank.learn.fingerprint import fingerprint
from vllm_leank.learn.run import learn
from vllm_leank.learn.stages import Progress, Recipe, Selection, Stage, _used, run_stage
from vllm_leank.learn.state import State
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import load_mask
from vllm_leank.mask.statistics import STATISTICS, Statistics
from vllm_leank.offline.calibration_prompts import calibration_prompts
from vllm_leank.offline.mask_request import MaskRequest
from vllm_leank.offline.prompts import Sample

WINDOW = Window(32, 32)
RECIPE = Recipe(steps=20, lr=0.05, reg=0.01)


def make_samples(count=12, prompt=160, answer=8):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 512, (count, prompt + answer)).tolist()
    return [Sample(row[:prompt], row[prompt:]) for row in ids]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "samples.jsonl"
    lines = [
        json.dumps({"prompt_token_ids": prompt, "answer_token_ids": answer})
        for prompt, answer in make_samples()
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def distiller(tiny_llama_dir):
    from transformers import AutoModelForCausalLM

    return Distiller(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), WINDOW)


def test_rate_rises_for_a_fifth_and_falls_for_a_fifth():
    rates = [Stage(steps=50, lr=2.0, reg=0).rate(step) for step in range(50)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert rates[9:41] == [2.0] * 32
    assert rates[-3:] == pytest.approx([0.6, 0.4, 0.2])
    assert min(Stage(steps=2000, lr=1.0, reg=0).rate(step) for step in range(2000)) == 0.1


def test_the_recipe_of_stage_2():
    selection = Selection(0.5, 32)
    assert Recipe(200, 0.02, 0.06).first() == Stage(200, 0.02, 0.06)
    assert Recipe(200, 0.02, 0.06).second(selection, 2) == Stage(20, 0.01, 0.0, selection, 400)
    assert Recipe(3).second(selection).steps == 1


def test_stage_2_selects_forwards_and_is_the_identity_backwards():
    factors = torch.rand(2, 2, 64, requires_grad=True)
    keep = Selection(0.75, 32).keep(Progress.start(factors.detach()).scores())
    used, blind = _used(factors, keep)
    assert keep.sum() == 2 * 32
    # Rounding may leave a kept channel a bit off 1.
    torch.testing.assert_close(used, torch.tensor(keep).float(), rtol=0, atol=1e-6)
    assert torch.equal(blind, torch.tensor(~keep.any(-1)))
    used.sum().backward()
    assert torch.equal(factors.grad, torch.ones_like(factors))
    assert _used(factors, None) == (factors, None)


def test_equal_factors_are_ranked_by_their_gradients():
    progress = Progress.start(torch.tensor([[[1.0, 1.0, 0.0, 0.0, 0.5, 1.0]]]))
    assert progress.scores().tolist() == [[[1, 1, 0, 0, 0.5, 1]]]
    progress.first_moment = torch.tensor([[[3.0, -2.0, 7.0, 6.0, -7.0, 0.0]]])
    assert np.argsort(-progress.scores()).tolist() == [[[1, 5, 0, 4, 3, 2]]]


def test_learned_channels_cost_less_than_random_ones(distiller):
    samples = make_samples(6)
    first = Progress.start(torch.ones(2, 2, 64))
    recipe = Recipe(steps=60, lr=0.05, reg=0.3)
    run_stage(recipe.first(), first, distiller, Shuffled(samples, seed=0))
    assert first.step == 60
    assert 0.05 < first.means[-1] < 0.9
    assert 0 <= first.factors.min() < 0.2
    assert 0.8 < first.factors.max() <= 1
    selection = Selection(0.5, 16)
    second = Progress.start(first.factors)
    run_stage(recipe.second(selection), second, distiller, Shuffled(samples, seed=0))
    assert not torch.equal(second.factors, first.factors)
    keep = selection.keep(second.scores())
    assert keep.mean() == 0.5

    def cost(mask):
        with torch.no_grad():
            mask = torch.tensor(mask)
            blind = ~mask.any(-1)
            return sum(distiller.loss(sample, mask.float(), blind).item() for sample in samples)

    rng = np.random.default_rng(0)
    random = [selection.keep(rng.random((2, 2, 64))) for _ in range(5)]
    assert cost(keep) < 0.8 * min(map(cost, random))


def test_a_loss_that_is_not_finite_ends_the_run(distiller):
    distiller.model.model.norm.weight.data[3] = torch.inf
    with pytest.raises(UserError, match="loss of step 1 is not finite"):
        run_stage(
            RECIPE.first(),
            Progress.start(torch.full((2, 2, 64), 0.5)),
            distiller,
            make_samples().__getitem__,
        )


def request_for(model, ratio=0.5, **options):
    asked = {"ratio": ratio, "align": 16, "sink": 32, "recent": 32} | options
    return MaskRequest.open(str(model), "leank/tiny", **asked)


def run(model, jsonl, state, recipe=RECIPE, ratio=0.5, **options):
    return learn(
        request_for(model, ratio), Data(jsonl), state, recipe=recipe, device="cpu", **options
    )


def test_an_interrupted_run_ends_its_step_and_goes_on_to_the_same_mask(
    tiny_llama_dir, jsonl, tmp_path, monkeypatch
):
    whole = run(tiny_llama_dir, jsonl, tmp_path / "a.state")
    shuffled = Shuffled.__call__
    seen = []

    def interrupting(self, number):
        seen.append(number)
        if len(seen) in (8, 14):
            signal.raise_signal(signal.SIGTERM if len(seen) == 8 else signal.SIGINT)
        return shuffled(self, number)

    monkeypatch.setattr(Shuffled, "__call__", interrupting)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for step in (8, 14):
        with pytest.raises(UserError, match=f"after step {step} of 20 of stage 1; the same comm"):
            run(tiny_llama_dir, jsonl, tmp_path / "b.state")
    # The weights of an uninterrupted run do not depend on when it was saved.
    resumed = run(tiny_llama_dir, jsonl, tmp_path / "b.state", save_steps=3, chunk=50)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert seen == list(range(22))
    np.testing.assert_allclose(resumed.factors, whole.factors, atol=1e-3)
    assert len(resumed.losses[0]) == 20
    assert len(resumed.losses[1]) == 2
    assert os.listdir(tmp_path).count("b.state") == 1
    assert not list(tmp_path.glob(".*"))


def test_stage_1_serves_other_ratios(tiny_llama_dir, jsonl, tmp_path, monkeypatch):
    state = tmp_path / "s.state"
    half = run(tiny_llama_dir, jsonl, state)
    monkeypatch.setattr(Shuffled, "__call__", lambda self, number: pytest.fail("runs again"))
    assert run(tiny_llama_dir, jsonl, state).mask.sha256 == half.mask.sha256
    monkeypatch.undo()
    numbers = []
    call = Shuffled.__call__
    monkeypatch.setattr(
        Shuffled, "__call__", lambda self, number: numbers.append(number) or call(self, number)
    )
    quarter = run(tiny_llama_dir, jsonl, state, ratio=0.75)
    assert numbers == [20, 21]
    assert quarter.mask.k_kept == 0.25
    fresh = run(tiny_llama_dir, jsonl, tmp_path / "fresh.state", ratio=0.75)
    assert fresh.mask.sha256 == quarter.mask.sha256


def test_a_ratio_that_stage_1_surpassed_is_noted(tiny_llama_dir, jsonl, tmp_path, capsys):
    recipe = Recipe(steps=30, lr=0.1, reg=100.0)
    run(tiny_llama_dir, jsonl, tmp_path / "s.state", recipe, ratio=0.25)
    assert "factors above 0, but the mask keeps 75.0%" in capsys.readouterr().err
    run(tiny_llama_dir, jsonl, tmp_path / "s.state", recipe, ratio=1.0)
    assert "above 0" not in capsys.readouterr().err


def test_a_state_of_something_else_is_refused(tiny_llama_dir, jsonl, tmp_path):
    state = tmp_path / "s.state"
    run(tiny_llama_dir, jsonl, state, recipe=replace(RECIPE, steps=1))
    before = state.read_bytes()
    with pytest.raises(UserError, match=r"with steps 1, not 20; remove it"):
        run(tiny_llama_dir, jsonl, state)
    assert state.read_bytes() == before
    state.write_bytes(before[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        run(tiny_llama_dir, jsonl, state)
    safetensors.torch.save_file({"x": torch.ones(1)}, state)
    with pytest.raises(UserError, match="not the state of a run"):
        run(tiny_llama_dir, jsonl, state)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("settings", "lacks the settings of 'first'"),
        ("second", "lacks the settings of 'second'"),
        ("not JSON", "lacks the settings of 'first'"),
        ("first.losses", "lacks the tensor 'first.losses'"),
        ("second.first_moment", "lacks the tensor 'second.first_moment'"),
        ("checks.best", "lacks the tensor 'checks.best'"),
        ("start.v_mean", "lacks the tensor 'start.v_mean'"),
    ],
)
def test_a_state_that_lacks_something_is_refused(tmp_path, left_out, message):
    path, ones = tmp_path / "s.state", torch.ones(1, 1, 2)
    checks = Checks([0], [1.0], np.ones((1, 1, 2)))
    statistics = Statistics(*(np.ones((1, 1, 2), np.float16) for _ in STATISTICS))
    whole = State({"a": 1}, {}, Progress.start(ones), Progress.start(ones), checks, statistics)
    whole.save(path)
    assert State.resume(path, {"a": 1}, {}, "cpu").checks.losses == [1.0]
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    if left_out == "settings":
        del metadata["settings"]
    elif left_out == "second":
        metadata["settings"] = json.dumps({"first": {"a": 1}, "second": None})
    elif left_out == "not JSON":
        metadata["settings"] = "{"
    else:
        del tensors[left_out]
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=f"s.state: {message}, so it is no whole state of a run"):
        State.resume(path, {"a": 1}, {}, "cpu")


def test_a_state_of_other_weights_is_refused(tiny_llama_dir, jsonl, tmp_path):
    """Though they are in a folder of that name, and of the same shape."""
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    state = tmp_path / "s.state"
    recipe = replace(RECIPE, steps=1)
    run(model, jsonl, state, recipe=recipe)
    file = model / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["model.norm.weight"][3] += 0.5
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match="is of a run with model_sha256 "):
        run(model, jsonl, state, recipe=recipe)


def test_a_file_of_any_name_can_be_told(tiny_llama_dir, jsonl, tmp_path):
    """Masks are text, and the name is in them: it must not be lost when all is done."""
    odd = tmp_path / "\udcff.jsonl"
    odd.write_bytes(jsonl.read_bytes())
    found = run(tiny_llama_dir, odd, tmp_path / "s.state", recipe=replace(RECIPE, steps=1))
    assert found.mask.provenance["data"] == "\\udcff.jsonl"
    prompts = calibration_prompts(
        Checkpoint.open(str(tiny_llama_dir)), odd, Window(32, 32), max_tokens=500
    )
    assert prompts.provenance["data"] == "\\udcff.jsonl"


def test_models_are_told_apart_by_config_and_weights(tiny_llama_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    found = [fingerprint(model), fingerprint(copy.deepcopy(model))]
    model.config.rope_parameters = model.config.rope_parameters | {"rope_theta": 7.0}
    found.append(fingerprint(model))
    model.lm_head.weight.data[0, 0] *= -1
    found.append(fingerprint(model.bfloat16()))
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_two_processes_average_their_gradients(tiny_llama_dir, jsonl, tmp_path):
    """Each on one sample; alone, one process sees the mean of both."""
    script = tmp_path / "leank.py"
    script.write_text("from vllm_leank.cli import main; main()")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    options = map(str, arguments(tiny_llama_dir, jsonl, tmp_path / "m"))
    done = subprocess.run([*launch, script, *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of K pruned") == 1
    assert load_mask(tmp_path / "m").provenance["samples_per_step"] == 2
    with safetensors.safe_open(tmp_path / "m.state", "pt") as file:
        found = file.get_tensor("first.factors"), file.get_tensor("first.losses")
        checked = file.get_tensor("checks.losses")

    class Both(Distiller):
        def loss(self, samples, factors, blind=None):
            losses = []
            for sample in samples:
                losses.append(super().loss(sample, factors, blind) / 2)
                losses[-1].backward()
            return sum(losses).detach() + 0 * factors.sum()

    from transformers import AutoModelForCausalLM

    source, held_out, _ = Data(jsonl).open(request_for(tiny_llama_dir).checkpoint, WINDOW, seed=0)
    progress = Progress.start(torch.ones(2, 2, 64))
    both = Both(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), WINDOW)
    pairs = lambda number: (source(2 * number), source(2 * number + 1))  # noqa: E731
    run_stage(Recipe(4, 0.05, 0.01).first(), progress, both, pairs)
    torch.testing.assert_close(found[0], progress.factors, atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1], torch.tensor(progress.losses).double(), atol=1e-5, rtol=0)
    # Held-out samples are shared out, two to the one and one to the other.
    assert len(held_out) == 3
    alone = Distiller(both.model, WINDOW)
    keep = Selection(0.5, 16).keep(Progress.start(found[0]).scores())
    assert served_loss(alone, keep, held_out) == pytest.approx(checked[0].item(), rel=1e-3)


@pytest.fixture
def leank(monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["leank", *map(str, args)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capsys.readouterr()
        return exit_info.value.code or 0, out, err

    return call


def arguments(model, jsonl, out, /, **options):
    options = {
        "model": model,
        "data": jsonl,
        "ratio": 0.5,
        "align": 16,
        "sink": 32,
        "recent": 32,
        "from": "nothing",
        "steps": 4,
        "lr": 0.05,
        "reg": 0.01,
        "device": "cpu",
        "out": out,
    } | options
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in options.items())
    return ["mask", "learn", *(part for pair in pairs for part in pair)]


def test_the_command_writes_mask_state_and_picture(leank, tiny_llama_dir, jsonl, tmp_path):
    out, picture = tmp_path / "m.yaml", tmp_path / "m.png"
    code, stdout, stderr = leank(*arguments(tiny_llama_dir, jsonl, out, picture=picture))
    assert code == 0
    assert "50.00% of K pruned (50.00% asked)" in stdout
    assert "stage 1: step 4 of 4, loss" in stderr
    assert "stage 2: step 1 of 1, loss" in stderr
    said = " ".join(stderr.split())
    assert "stage 2: 1 steps and 1 more checks of 3 held-out samples: about " in said
    assert re.search("stage 2: before learning, loss on held-out samples [0-9.e-]+ ", said)
    assert stdout.splitlines()[1].startswith(("kept the mask after step 1: ", "learning did not "))
    mask = load_mask(out)
    assert mask.k_kept == 0.5
    assert (mask.sink, mask.recent, mask.align) == (32, 32, 16)
    provenance = mask.provenance
    assert provenance["method"] == "learn"
    assert (provenance["data"], provenance["samples"]) == ("samples.jsonl", 9)
    assert (provenance["held_out"], provenance["last_step"]) == (3, 1)
    assert (provenance["steps"], provenance["lr"], provenance["reg"]) == (4, 0.05, 0.01)
    assert provenance["second_stage_loss"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "m.yaml.state").exists()
    code, _, err = leank(*arguments(tiny_llama_dir, jsonl, out))
    assert code == 2
    assert "exists already" in err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("ratio", "1.5", "between 0 (keep all) and 1"),
        ("align", "24", "multiple of 16"),
        ("recent", "5", "at least 32"),
        ("steps", "0", "at least 1"),
        ("lr", "0", "above 0"),
        ("reg", "-1", "0 or more"),
        ("chunk", "0", "at least 1"),
        ("patience", "0", "patience is 0; it must be at least 1 check"),
        ("dtype", "int8", "float32, bfloat16"),
        ("device", "warp", "cannot be used"),
        ("model", "/no/such/model", "no such directory"),
        ("data", "/no/such/file", "No such file"),
        ("text", "/no/such/file", "--data brings its own"),
        ("recent", "256", "no sample has far tokens"),
        ("out", "/no/such/folder/m.yaml", "no such directory"),
        ("state", "/no/such/folder/m.state", "no such directory"),
        ("picture", "m.jpeg2", ".png, .svg, .pdf"),
    ],
)
def test_bad_options_end_in_one_message_and_no_file(
    leank, tiny_llama_dir, jsonl, tmp_path, option, value, message
):
    code, _, err = leank(*arguments(tiny_llama_dir, jsonl, tmp_path / "m", **{option: value}))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [jsonl]


def test_two_outputs_cannot_be_one_file(leank, tiny_llama_dir, jsonl, tmp_path):
    out = tmp_path / "m.png"
    for options in ({"state": out}, {"state": tmp_path / "." / "m.png"}, {"picture": out}):
        code, _, err = leank(*arguments(tiny_llama_dir, jsonl, out, **options))
        assert code == 2
        assert f"{out}: --out and --{next(iter(options))} would write the same file" in err
    assert sorted(tmp_path.iterdir()) == [jsonl]


def test_generated_data_over_any_tokenizer(leank, tiny_llama_dir, tmp_path):
    model = copy_with_bytes(tiny_llama_dir, tmp_path / "model")
    (tmp_path / "essay.txt").write_text("Some prose. More of it!")
    options = arguments(model, "", tmp_path / "m", text=tmp_path / "essay.txt")
    del options[options.index("--data") : options.index("--data") + 2]
    code, _, err = leank(*options, "--min-tokens", 600, "--max-tokens", 700, "--chunk", 256)
    assert code == 0, err
    provenance = load_mask(tmp_path / "m").provenance
    assert provenance["data"].startswith("generated: dense retrieval and multi-value")
    assert (provenance["text"], provenance["max_tokens"]) == ("essay.txt", 700)


def test_generated_data_needs_room_and_a_tokenizer(leank, tiny_llama_dir, tmp_path):
    options = arguments(tiny_llama_dir, "", tmp_path / "m")
    del options[options.index("--data") : options.index("--data") + 2]
    code, _, err = leank(*options, "--min-tokens", 50)
    assert code == 2
    assert "--min-tokens is 50; it must lie between 96" in err
    code, _, err = leank(*options, "--min-tokens", 500)
    assert code == 2
    assert "cannot be loaded by transformers" in err
    assert not list(tmp_path.iterdir())
