"""Answers with simulated caches: drafts change nothing, and a study goes on where it was."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from itertools import pairwise

import psutil
import pytest
import torch
from baselines.kivi import Kivi
from baselines.once_per_prompt import OncePerPrompt
from baselines.rounded_cache import CacheHook
from byte_tokenizer import copy_with_bytes
from mask_samples import coded_mask
from real import simulated_study
from real.caches import caches_of_group
from real.greedy import Guesses, greedy_answer
from real.questions import Question, save_questions
from real.simulated_study import Asker, Caches, full_attention, in_order, parser
from tiny_models import load_tiny

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.file import save_mask
from vllm_leank.offline.context import Context, logits, logits_after, read_prompt
from vllm_leank.offline.served_archive import ServedArchive
from vllm_leank.offline.simulate import SimulatedArchive

WINDOW = Window(32, 64)
PROMPT, ANSWER = 400, 24


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return tiny_llama(layers=2)


@pytest.fixture(scope="module")
def model(folder):
    return load_tiny(folder).eval()


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(512, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def context(model, prompt):
    """Has all of the prompt."""
    context = Context(Geometry.from_hf_config(model.config))
    read_prompt(model, context, prompt, 128)
    return context


def archive_hook(folder):
    archive = ServedArchive(coded_mask(folder))
    return SimulatedArchive(WINDOW, archive, archive.blind)


def one_by_one(model, context, first, hook, tokens):
    """The definition: the likeliest token after all before it, which are read again each time."""
    answer = [first]
    while len(answer) < tokens:
        answer.append(int(logits_after(model, context, answer, hook)[-1].argmax()))
    return answer


@pytest.mark.parametrize("kind", ["dense", "archive", "kivi"])
def test_guesses_change_no_answer(folder, model, context, prompt, kind):
    hooks = {
        "dense": full_attention,
        "archive": archive_hook(folder),
        "kivi": CacheHook(Kivi(2)),
    }
    hook = hooks[kind]
    expected = one_by_one(model, context, 7, hook, ANSWER)
    assert len(set(expected)) > 3
    other = one_by_one(model, context, 7, full_attention, ANSWER)
    wrong_once = [*expected[:5], expected[5] + 1, *expected[6:]]
    stop = expected[8]
    end = expected.index(stop)
    for like in ((), expected, expected[:9], other, wrong_once, expected[3:], [1] * 50):
        ask = partial(greedy_answer, model, context, (prompt[-1], 7), hook, ANSWER)
        guesses = Guesses([*prompt, *like])
        assert ask((), guesses) == expected
        assert context.length == PROMPT
        assert ask((stop,), guesses) == expected[:end]


def test_guesses_save_steps(model, context, prompt, monkeypatch):
    expected = one_by_one(model, context, 7, full_attention, ANSWER)
    assert len(set(pairwise([*prompt, *expected]))) == PROMPT + ANSWER - 1
    calls = []

    def counted(*args):
        calls.append(args)
        return logits(*args)

    monkeypatch.setattr("real.greedy.logits", counted)
    wrong_once = [*expected[:5], expected[5] + 1, *expected[6:]]
    # Behind a wrong guess two more tokens stand after pairs that the text does not have.
    for like, steps in (((), ANSWER - 1), (expected, 1), (wrong_once, 4)):
        calls.clear()
        ask = partial(greedy_answer, model, context, (prompt[-1], 7), full_attention, ANSWER)
        assert ask((), Guesses([*prompt, *like])) == expected
        assert len(calls) == steps


def test_wrong_guesses_make_fewer(model, context, prompt, monkeypatch):
    sizes = []

    def next_number(model, context, ids):
        """A model that counts."""
        sizes.append(len(ids) - 1)
        found = torch.zeros(len(ids), 1000)
        return found.scatter(1, torch.tensor(ids)[:, None] + 1, 1.0)

    monkeypatch.setattr("real.greedy.logits", next_number)
    guesses = Guesses([1, 2, 3, *[900] * 60, *range(5, 200)])
    answer = greedy_answer(model, context, (1, 2), full_attention, 100, (), guesses)
    assert answer == list(range(2, 102))
    assert sizes == [32, 0, 0, 8, 32, 32, 19]


@pytest.mark.parametrize("group", ["kivi", "kitty"])
def test_caches_of_others_are_rounded_once_a_prompt(context, model, group):
    geometry = Geometry.from_hf_config(model.config)
    one = caches_of_group(group, geometry, WINDOW, once=True)[0]
    rounded, rounding = [], one.hook.cache.round

    def watch(layer, key, value):
        rounded.append(layer)
        return rounding(layer, key, value)

    one.hook.cache.round = watch
    for _ in range(2):
        for _ in range(3):
            logits_after(model, context, [1], one.hook)
        one.end()
    assert sorted(rounded) == [0, 0, 1, 1]
    assert all(other.end is None for other in caches_of_group(group, geometry, WINDOW))


def test_far_tokens_are_rounded_once(folder, context):
    key, value = context.key(1), context.value(1)
    archive, asked = ServedArchive(coded_mask(folder)), []

    def watched(layer, first, key, value):
        asked.append((first, key.shape[2]))
        return archive(layer, first, key, value)

    once = OncePerPrompt(watched)
    for end in (128, 256, 192):
        far = slice(32, 32 + end)
        expected = archive(1, 32, key[:, :, far], value[:, :, far])
        found = once(1, 32, key[:, :, far], value[:, :, far])
        for mine, its in zip(found, expected, strict=True):
            assert torch.equal(mine, its)
    assert asked == [(32, 128), (160, 128)]
    once.forget()
    once(1, 32, key[:, :, :32], value[:, :, :32])
    assert asked[-1] == (32, 32)


def test_the_first_of_each_cell_is_asked_first():
    questions = [
        Question(task, length, str(number), ("x",), 1)
        for task, length, count in (("b", 8, 2), ("a", 8, 3), ("a", 4, 1))
        for number in range(count)
    ]

    def order(count, *scores):
        cells = [{"task": task, "length": length, "scores": one} for task, length, one in scores]
        found = in_order(questions, count, {"cells": cells})
        return [(one.task, one.length, one.prompt) for one in found]

    everything = [("a", 4, "0"), ("a", 8, "0"), ("b", 8, "0"), ("a", 8, "1"), ("b", 8, "1")]
    assert order(None) == [*everything, ("a", 8, "2")]
    assert order(2) == everything
    assert order(2, ("a", 8, [1.0]), ("a", 4, [0.0])) == everything[2:]


def caches_of(model, *options):
    """What a command line names."""
    return Caches.of(parser().parse_args(["--model", str(model), *REQUIRED, *map(str, options)]))


REQUIRED = "--questions", "none", "--out", "none"


@pytest.fixture(scope="module")
def folder_with_tokenizer(folder, tmp_path_factory):
    target = copy_with_bytes(folder, tmp_path_factory.mktemp("simulated") / "model")
    save_mask(coded_mask(folder), target / "codes.yaml")
    return target


def test_answers_are_those_of_each_cache_whatever_was_asked_before(folder_with_tokenizer, model):
    """Of several prompts, each beside the definition with hooks that have seen nothing else."""
    options = (
        *("--masks", folder_with_tokenizer / "codes.yaml", "--variants", "kivi,think,kitty"),
        *("--sink", 32, "--recent", 64),
    )
    asker = Asker(model, caches_of(folder_with_tokenizer, *options))
    generator = torch.Generator().manual_seed(3)
    context = Context(Geometry.from_hf_config(model.config))
    seen = set()
    for length in (PROMPT, PROMPT, PROMPT - 70):
        prompt = torch.randint(512, (length,), generator=generator).tolist()
        found = asker.answers(prompt, ANSWER)
        read_prompt(model, context, prompt, 128)
        for one in caches_of(folder_with_tokenizer, *options).variants:
            if one.begin is not None:
                one.begin(model, context, prompt)
            first = found["dense"][0]
            assert found[one.name] == one_by_one(model, context, first, one.hook, ANSWER)
            seen.add((length, tuple(found[one.name])))
    assert len(seen) > 3 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "kivi,pruned"], r"--variants has \['pruned'\]; allowed: think, vllm"),
        (["--variants", "kivi,kivi"], "--variants names a group twice"),
        (["--masks", "codes.yaml", "codes.yaml"], "--masks names codes twice"),
    ],
)
def test_what_cannot_be_asked_is_refused(folder_with_tokenizer, options, message, monkeypatch):
    monkeypatch.chdir(folder_with_tokenizer)
    with pytest.raises(UserError, match=message):
        caches_of(folder_with_tokenizer, *options)


def test_answers_that_leave_the_window_are_refused(folder_with_tokenizer):
    caches = caches_of(folder_with_tokenizer, "--masks", folder_with_tokenizer / "codes.yaml")
    recent = coded_mask(folder_with_tokenizer).recent
    caches.check([Question("a", 600, "", ("x",), recent)])
    message = f"does not fit into the last {recent}, which leank codes keeps"
    with pytest.raises(UserError, match=message):
        caches.check([Question("a", 600, "", ("x",), recent + 1)])


def test_the_study_writes_what_it_finds_and_goes_on(
    folder_with_tokenizer, model, tmp_path, monkeypatch, capsys
):
    folder = folder_with_tokenizer
    texts = [f"{letter}{number} " * 120 for letter in "ab" for number in range(2)]
    # Scores are shares of many letters, so that they tell answers apart.
    letters = tuple(map(chr, range(32, 127)))
    questions = [Question(text[0], 600, text, letters, 40) for text in texts]
    save_questions(questions, tmp_path / "questions.gz")

    caches = (
        *("--masks", folder / "codes.yaml", "--variants", "kivi,think,kitty"),
        *("--sink", 32, "--recent", 64, "--dtype", "float32"),
    )

    def study(*options):
        command = [
            *("study", "--model", folder, "--questions", tmp_path / "questions.gz"),
            *("--out", tmp_path / "out.json", *caches, *options),
        ]
        monkeypatch.setattr("sys.argv", list(map(str, command)))
        simulated_study.main()
        return json.loads((tmp_path / "out.json").read_text())

    names = ["dense", "leank codes", "KIVI, 4 bits", "KIVI, 2 bits", "ThinK, 70% of K pruned"]
    names.append("Kitty, 2 bits, an eighth of K at 4")
    part = study("--count", 1, "--commit", "first")
    assert [one["variant"] for one in part["variants"]] == names
    assert {len(cell["scores"]) for one in part["variants"] for cell in one["cells"]} == {1}
    assert "2 questions each" in capsys.readouterr().out
    rest = study("--workers", 2, "--commit", "second")
    asker = Asker(model, caches_of(folder, *caches))
    expected = [asker.scores(question) for question in questions]
    for one in rest["variants"]:
        found = [score for cell in one["cells"] for score in cell["scores"]]
        assert found == [scores[one["variant"]] for scores in expected]
    assert len({tuple(scores.values()) for scores in expected}) > 2
    assert (rest["commit"], rest["dtype"]) == ("second", "float32")
    assert [one["commit"] for one in rest["earlier"]] == ["first"]
    # Nothing is left to ask, and nobody asked again.
    assert study("--commit", "third") == rest
    with pytest.raises(SystemExit, match="made with another window"):
        study("--recent", 96)
    (tmp_path / "out.json").write_text("{}")
    with pytest.raises(SystemExit, match="no results of this study"):
        study()


@pytest.mark.long
def test_a_run_that_is_stopped_leaves_no_process(repo, folder_with_tokenizer, tmp_path):
    questions = [Question("a", 600, f"{number} " * 120, ("x",), 40) for number in range(2000)]
    save_questions(questions, tmp_path / "questions.gz")
    out = tmp_path / "out.json"
    command = [
        *(sys.executable, "-m", "real.simulated_study", "--model", folder_with_tokenizer),
        *("--questions", tmp_path / "questions.gz", "--out", out, "--variants", "kitty"),
    ]
    run = psutil.Popen(
        list(map(str, command)),
        env=os.environ | {"PYTHONPATH": str(repo / "benchmarks")},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    children = []
    try:
        for _ in range(600):
            if out.exists() or run.poll() is not None:
                break
            time.sleep(0.1)
        children = run.children(recursive=True)
        assert children
        run.terminate()
        assert "stopped" in run.communicate(timeout=60)[1]
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
    finally:
        for process in (run, *children):
            with suppress(psutil.NoSuchProcess):
                process.kill()
