"""`leank eval ruler`: the command lines it makes of lm_eval, and what it refuses."""

import importlib.util
import json
import shlex
import sys

import pytest

from vllm_leank.cli import evaluation
from vllm_leank.errors import UserError
from vllm_leank.offline import ruler
from vllm_leank.offline.ruler import SYNTHETIC, chosen_tasks


def parsed(line):
    """The options of a command line, by name; those of `--model_args` as a mapping."""
    words = shlex.split(line)
    assert words[:6] == [sys.executable, "-P", "-m", "lm_eval", "--model", "local-completions"]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    options["--model_args"] = dict(
        pair.split("=", 1) for pair in options["--model_args"].split(",")
    )
    return options


def test_each_length_has_a_command_line_of_its_own(leank, tmp_path):
    code, out, _ = leank(
        "eval", "ruler", "org/name", "--base-url", "http://there:9000/v1/", "--tasks", "synthetic",
        "--lengths", "4096,131072", "--limit", 20, "--out", tmp_path / "a b", "--dry-run",
    )  # fmt: skip
    assert code == 0
    first, second = map(parsed, out.splitlines())
    assert first == {
        "--model": "local-completions",
        "--model_args": {
            "model": "org/name",
            "base_url": "http://there:9000/v1/completions",
            "tokenizer": "org/name",
            "tokenizer_backend": "huggingface",
            "tokenized_requests": "False",
            "num_concurrent": "32",
            "max_length": "4352",
            "timeout": "3600",
        },
        "--tasks": ",".join(SYNTHETIC),
        "--metadata": '{"max_seq_lengths": [4096]}',
        "--limit": "20",
        "--output_path": str(tmp_path / "a b" / "4096"),
    }
    assert json.loads(second["--metadata"]) == {"max_seq_lengths": [131072]}
    assert second["--model_args"]["max_length"] == str(131072 + 256)


def test_what_is_not_given_is_left_to_lm_eval(leank):
    _, out, _ = leank("eval", "ruler", "served", "--tokenizer", "/m", "--dry-run")
    lines = [parsed(line) for line in out.splitlines()]
    assert [line["--tasks"] for line in lines] == ["ruler"] * 4
    assert lines[0]["--model_args"]["tokenizer"] == "/m"
    assert not {"--limit", "--output_path"} & set(lines[0])


def test_tasks_may_be_named_alone_and_together():
    assert chosen_tasks("ruler_vt,ruler_qa_squad") == ("ruler_vt", "ruler_qa_squad")
    assert chosen_tasks("synthetic,ruler_vt") == SYNTHETIC
    with pytest.raises(UserError, match="names none"):
        chosen_tasks(",")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lengths", "4k"], "--lengths is '4k'"),
        (["--lengths", "0"], "--lengths is '0'"),
        (["--tokenizer", "a,b"], "no commas in tokenizer"),
    ],
)
def test_bad_options_are_refused(leank, args, message):
    code, _, err = leank("eval", "ruler", "m", *args, "--dry-run")
    assert code == 2
    assert message in err


def test_without_lm_eval_it_says_what_to_install(leank, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        ruler.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name)
    )
    code, _, err = leank("eval", "ruler", "m")
    assert code == 2
    assert "missing: lm_eval" in err
    assert "pip install 'lm_eval[api,ruler]'" in err


def test_lengths_run_one_after_the_other_until_one_fails(leank, monkeypatch):
    monkeypatch.setattr(ruler, "require_lm_eval", lambda: None)
    ran = []

    class Done:
        returncode = 3

    def run(command, **_):
        ran.append(command)
        return Done()

    monkeypatch.setattr(evaluation.subprocess, "run", run)
    code, _, err = leank("eval", "ruler", "m", "--lengths", "1024,2048")
    assert code == 2
    assert "lm_eval ended with exit code 3" in err
    Done.returncode = 0
    assert leank("eval", "ruler", "m", "--lengths", "1024,2048")[0] == 0
    assert len(ran) == 3
