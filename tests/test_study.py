"""The study of real models: its questions, their scores, runs that go on, and the table."""

import gzip
import json
import sys
from pathlib import Path

import pytest
from fresh import run
from real import study_picture, study_table
from real.answers import add_answers, scores_of, tell_run
from real.long_text import ends_in_loop, prompts, said_before, summary
from real.pictures import label_of, run_picture
from real.questions import Question, cells_of, load_questions, save_questions
from real.served import check_words, served
from real.study_engine import WHAT, results_of, unasked
from real.study_table import lost, merged, points, shared_cells
from real.text_questions import ask_code, ask_document

from vllm_leank.bench.results import save_results
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import load_mask

CODE = '''
def opened(path):
    """Give what the file at the path holds."""
    return path

def closed(path):
    """Give what the file at the path holds."""

def renamed_twice(path, other):
    """Move a file to another place, and back again.

    More.
    """
    return other
'''


def test_functions_are_asked_by_docstrings_that_stand_once():
    assert ask_code(CODE, len(CODE)) == [
        (
            'Which function above has the docstring that begins with "Move a file to another '
            'place, and back again."? Answer with its name only.',
            "renamed_twice",
        )
    ]
    assert ask_code(CODE, 100) == []
    assert ask_code(CODE + "renamed_twice()", len(CODE)) == []


def test_sentences_are_asked_by_words_that_stand_once():
    sentence = "The keeper of the old lighthouse wrote every evening into his book what ships"
    text = f"It rained. {sentence} had gone by. He slept. "
    question, answer = ask_document(text, len(text))[0]
    assert '"The keeper of the old lighthouse wrote every"' in question
    assert answer == "evening into his book what"
    assert ask_document(text + text, len(text)) == []


@pytest.mark.parametrize(
    ("answer", "score"), [("it is KGXMX and abc", 1.0), ("ABC.", 0.5), ("kgx mx", 0.0)]
)
def test_the_score_is_the_share_of_references_found(answer, score):
    assert Question("ruler_vt", 1024, "", ("Kgxmx", "ABC"), 30).score(answer) == score


def test_a_file_of_questions_is_read_as_it_was_written(tmp_path):
    questions = [
        Question("b", 2048, "long\n", ("x",), 8),
        Question("a", 1024, "ü", ("y", "z"), 9),
        Question("b", 1024, "1", ("x",), 8),
        Question("b", 1024, "2", ("x",), 8),
    ]
    first, second = tmp_path / "1.gz", tmp_path / "2.gz"
    save_questions(questions, first)
    save_questions(questions, second)
    read, digest = load_questions(first)
    assert read == questions
    assert load_questions(second)[1] == digest
    assert list(cells_of(read, 1)) == [("a", 1024), ("b", 1024), ("b", 2048)]
    assert [one.prompt for one in cells_of(read, None)["b", 1024]] == ["1", "2"]


@pytest.mark.parametrize("content", [b"no gzip", b"[1]\n", b'{"task": "a"}\n', b""])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "questions.gz"
    path.write_bytes(content if content == b"no gzip" else gzip.compress(content))
    with pytest.raises(UserError, match=r"no file of questions|no questions"):
        load_questions(path)


@pytest.mark.parametrize("kept", [15, -30, -4])
def test_a_file_that_was_cut_is_refused(tmp_path, kept):
    path = tmp_path / "questions.gz"
    text = "".join(f'{{"task": "{number}"}}\n' for number in range(99))
    path.write_bytes(gzip.compress(text.encode())[:kept])
    with pytest.raises(UserError, match="no file of questions"):
        load_questions(path)


def result(name, bytes_, scores, **changed):
    cells = [
        {"task": task, "length": length, "scores": one} for (task, length), one in scores.items()
    ]
    return {
        "what": WHAT, "variant": name, "model": "m", "engine_args": {}, "mask": None,
        "questions_sha256": "0", "token_bytes": bytes_, "cells": cells,
    } | changed  # fmt: skip


def test_a_stopped_run_goes_on_and_no_other(tmp_path):
    path = tmp_path / "dense.json"
    run = result("dense", 100, {}) | {"questions": "q", "results": "r"}
    fresh = results_of(run, path)
    assert fresh["cells"] == []
    assert "questions" not in fresh
    path.write_text(json.dumps(result("dense", 100, {("a", 1): [1.0]})))
    assert len(results_of(run, path)["cells"]) == 1
    with pytest.raises(UserError, match="made with another engine_args, mask, questions_sha256"):
        results_of(run | {"engine_args": {"seed": 1}, "mask": {}, "questions_sha256": "1"}, path)


def test_results_say_which_mask_it_was(with_tokenizer, mask_file):
    checkpoint = Checkpoint.open(str(with_tokenizer))
    assert served("dense", checkpoint).mask is None
    for word in (mask_file, f"{mask_file}@0.1"):
        one = served(str(word), checkpoint)
        assert one.mask["sha256"] == load_mask(mask_file).sha256
        assert one.engine_args["additional_config"]["leank"]["mask"] == str(mask_file)


def test_caches_of_vllm_may_leave_layers_as_they_are(tiny_llama):
    checkpoint = Checkpoint.open(str(tiny_llama(layers=6)))
    rounded, ends = (served(word, checkpoint) for word in ("fp8", "fp8@ends"))
    assert (rounded.name, rounded.engine_args) == ("vllm_fp8", {"kv_cache_dtype": "fp8"})
    assert ends.name == "vllm_fp8_ends"
    assert ends.engine_args == {
        "kv_cache_dtype": "fp8",
        "kv_cache_dtype_skip_layers": ["0", "1", "4", "5"],
    }
    layer = 2 * 2 * 64
    assert (rounded.token_bytes, ends.token_bytes) == (6 * layer, (2 + 4 * 2) * layer)
    assert served("turboquant_4bit_nc", checkpoint).token_bytes < rounded.token_bytes + 4 * layer
    with pytest.raises(UserError, match=r"fp8@0\.1; vLLM's caches have @ends alone"):
        served("fp8@0.1", checkpoint)


def test_more_questions_are_added_to_those_asked(tmp_path):
    """What was asked is not asked again, and both runs are told."""
    path = tmp_path / "dense.json"
    first = {"commit": "1", "command": "c", "count": 1, "machine": {"gpu": "x"}}
    path.write_text(json.dumps(result("dense", 100, {("a", 1): [1.0], ("b", 1): [1.0]}, **first)))
    run = {"results": "r", "commit": "1", "command": "c", "count": None}
    found = results_of(result("dense", 100, {}) | run, path)
    cells = {("a", 1): ["one", "two", "three"], ("b", 1): ["one"], ("c", 1): ["one"]}
    assert unasked(cells, found) == {("a", 1): ["two", "three"], ("c", 1): ["one"]}
    for name, answers in {("a", 1): [0.0, 0.5], ("c", 1): [0.25]}.items():
        add_answers(found, *name, {"scores": answers})
    assert unasked(cells, found) == {}
    assert scores_of(found) == {("a", 1): [1.0, 0.0, 0.5], ("b", 1): [1.0], ("c", 1): [0.25]}
    tell_run(first, found, has_answers=True)
    assert "earlier" not in found
    for gpu in ("x", "y", "y"):
        tell_run(run | {"machine": {"gpu": gpu}}, found, has_answers=True)
    assert found["earlier"] == [first, first | {"count": None}]
    assert (found["count"], found["machine"]) == (None, {"gpu": "y"})
    fresh = results_of(result("dense", 100, {}) | run, tmp_path / "none.json")
    tell_run(run | {"machine": {}}, fresh, has_answers=False)
    assert "earlier" not in fresh


def test_points_are_of_the_questions_that_all_were_asked(tmp_path, capsys):
    dense = {("a", 1024): [1.0, 1.0], ("b", 1024): [1.0, 0.5], ("b", 2048): [0.0, 0.0]}
    small = {("b", 1024): [0.5, 0.5], ("a", 1024): [1.0, 0.0]}
    for one in (result("small", 25, small), result("dense", 100, dense)):
        (tmp_path / f"{one['variant']}.json").write_text(json.dumps(one))
    found = merged(tmp_path)
    first, second = found["variants"]
    assert first["variant"] == "dense"
    cells = shared_cells(found["variants"])
    assert cells == {("a", 1024): 2, ("b", 1024): 2}
    fewer = shared_cells([first, result("few", 50, {("a", 1024): [0.0]})])
    assert fewer == {("a", 1024): 1}
    assert points(first, fewer).value == 100
    assert points(first, cells).value == pytest.approx(87.5)
    assert points(second, cells).value == pytest.approx(50)
    assert lost(second, first, cells).value == pytest.approx(37.5)
    study_table.show(found)
    assert "4.0" in capsys.readouterr().out


def test_the_picture_has_what_stores_another_number_of_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    scores = {("a", 1024): [1.0, 0.0]}
    leank = {"attention_backend": "leank"}
    read_less = leank | {"additional_config": {"leank": {"pages": 0.1}}}
    results = {
        "model": "m",
        "variants": [
            result("dense", 100, scores),
            result("vllm_new", None, scores),
            result("vllm_fp8", 50, scores),
            result("bits_2", 25, scores, engine_args=leank),
            result("bits_2_pages_0.1", 25, scores, engine_args=read_less),
        ],
    }
    names = [one["variant"] for one in study_picture.drawn(results)]
    assert names == ["dense", "vllm_fp8", "bits_2"]
    study_picture.draw(results, tmp_path / "study.svg")
    assert (tmp_path / "study.svg").stat().st_size > 10_000
    for variants in (results["variants"][1:], results["variants"][:1]):
        with pytest.raises(UserError, match="no results of dense attention and another"):
            study_picture.drawn(results | {"variants": variants})


def test_the_picture_has_simulated_caches_that_no_engine_has(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    folder, simulated, out = tmp_path / "study", tmp_path / "simulated.json", tmp_path / "out.svg"
    scores = {("a", 1024): [1.0, 0.0]}
    folder.mkdir()
    for name, size in (("dense", 100), ("vllm_fp8", 50)):
        save_results(result(name, size, scores), folder / f"{name}.json")
    names = "dense", "leank bits_2", "KIVI, 4 bits", "vLLM fp8", "nothing rounded"
    caches = [result(name, 40, scores) for name in names]
    told = {"model": "m", "questions_sha256": "0", "variants": caches}
    save_results(told, simulated)
    labels = []
    monkeypatch.setattr(
        study_picture, "label_of", lambda name: labels.append(name) or label_of(name)
    )
    study_picture.draw_files([folder], out)
    assert labels == ["vllm_fp8", "dense"]
    labels.clear()
    study_picture.draw_files([folder, simulated], out)
    assert labels == ["vllm_fp8", "KIVI, 4 bits", "dense"]
    for name in ("model", "questions_sha256"):
        save_results(told | {name: "another"}, simulated)
        with pytest.raises(UserError, match=f"are of another {name}"):
            study_picture.draw_files([folder, simulated], out)
    with pytest.raises(UserError, match="one file of simulated_study at most"):
        study_picture.draw_files([folder, simulated, simulated], out)


def test_the_command_of_a_picture_draws_it_or_says_why_not(tmp_path, monkeypatch, capsys):
    out, drawn = tmp_path / "study.svg", []

    def command(*words, **options):
        monkeypatch.setattr(sys, "argv", ["picture", *map(str, words), "--out", str(out)])
        run_picture("", "real.study", lambda given, path: drawn.append((given, path)), **options)

    command(tmp_path)
    command("a", "b", nargs="+")
    assert drawn == [(tmp_path, out), ([Path("a"), Path("b")], out)]
    with pytest.raises(SystemExit):
        command("a", "b")
    assert "unrecognized arguments: b" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["picture", str(tmp_path), "--out", str(out)])
    with pytest.raises(SystemExit, match=f"error: {tmp_path}: no results of real.study"):
        run_picture("", "real.study", lambda folder, _: merged(folder))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("leank bits_1", "1 bit"),
        ("bits_1.5", "1.5 bits"),
        ("leank pruned_70", "70% pruned"),
        ("learned_50", "50% pruned"),
        ("vllm_turboquant_4bit_nc", "TurboQuant 4bit_nc"),
        ("vLLM int4_per_token_head", "int4_per_token_head"),
        ("vllm_fp8_ends", "fp8, 4 layers whole"),
        ("vLLM fp8, 4 layers whole", "fp8, 4 layers whole"),
        ("Kitty, 2 bits, an eighth of K at 4", "Kitty, 2 bits"),
        ("2bit", "2bit"),
        ("dense", "dense"),
    ],
)
def test_pictures_call_caches_by_what_they_keep(name, label):
    assert label_of(name) == label


def test_results_of_different_runs_make_no_table(tmp_path):
    with pytest.raises(UserError, match="no results"):
        merged(tmp_path)
    for name, digest in (("a", "0"), ("b", "1")):
        one = result(name, 1, {}, questions_sha256=digest)
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    with pytest.raises(UserError, match="more than one questions_sha256"):
        merged(tmp_path)


@pytest.mark.long
def test_more_rows_of_queries_change_nothing_that_int4_gives(repo):
    script = "import runpy, sys; sys.path.append(sys.argv[1]); runpy.run_path(sys.argv[2])"
    paths = str(repo / "benchmarks"), str(repo / "tests/int4_with_rows.py")
    found = json.loads(run(script, *paths, env={"TRITON_INTERPRET": "1"}).splitlines()[-1])
    # Rows of a chunk and of a step of single tokens, as vLLM launches them and as the study does.
    assert found["rows"] == [16, 16, 64, 16]
    assert found["differ"] == [0.0, 0.0]
    assert found["largest"] > 1


def test_two_variants_with_the_results_file_of_one_are_refused():
    check_words(["dense", "a/2bit.yaml", "4bit.yaml"])
    with pytest.raises(UserError, match="2bit twice"):
        check_words(["a/2bit.yaml", "b/2bit.yaml"])


def test_loops_are_told_from_text():
    text = list(range(1000))
    assert not ends_in_loop(text)
    assert ends_in_loop(text + [7, 8, 9] * 64)
    assert not ends_in_loop(text + [7, 8, 9] * 63)
    assert ends_in_loop(list(range(64)) * 3)
    assert not ends_in_loop(list(range(65)) * 3)
    assert said_before(text) == 0
    assert said_before([1] * 103) == pytest.approx(0.99)
    told = summary([text, text + [5] * 1000])
    assert (told["loops"], told["mean_tokens"], told["answers"]) == (1, 1500, 2)
    assert len(set(prompts())) == 200
