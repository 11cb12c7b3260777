"""Every command in the README and docs: run as printed, or read by the parsers that would read it.

A command that is of no known kind fails. What needs a server is run by `test_serve.py`.
"""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mask_samples import random_mask
from packaging.requirements import Requirement
from recall.demo import MODEL, to_copy
from typer.main import get_command

from vllm_leank import cli
from vllm_leank.mask.file import save_mask

REPO = Path(__file__).parents[1]
PAGES = [
    "README.md",
    *("docs/" + path.name for path in sorted((REPO / "docs").glob("*.md"))),
    "masks/README.md",
    "examples/README.md",
    *(f"benchmarks/{name}README.md" for name in ("", "real/", "recall/", "shapes/")),
]
PROGRAMS = (
    "leank|vllm|python|pip|make|curl|torchrun|accelerate|docker|sh|export|[A-Z_]+=|\\.venv/bin/"
)
PLACEHOLDERS = ("MASK_OR_MODEL", "DIR_OR_ID", "SMALL_MODEL", "MODEL")
RUN = ("--version", "doctor", "plan", "mask show", "mask compose", "mask import")
"""leank's commands that take seconds on a CPU."""


def commands(page):
    """The commands of a page, whole: in blocks of `sh`, and indented ones."""
    text = (REPO / page).read_text()
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^    .*\n)+", outside, re.MULTILINE)
    blocks += [one for one in indented if re.match(rf" +({PROGRAMS})", one)]
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.strip().startswith("#"):
                yield line.strip()


COMMANDS = list(dict.fromkeys(line for page in PAGES for line in commands(page)))


def test_pages_have_commands():
    assert len(COMMANDS) > 40
    assert sum(line.startswith("leank") for line in COMMANDS) > 20


def filled(words):
    """The words with the bundled model in place of what stands for any."""
    names = "|".join(PLACEHOLDERS)
    return [re.sub(rf"(?<![A-Z_])({names})(?![A-Z_.])", str(MODEL), word) for word in words]


def read_leank(words):
    """Raises what typer would say of a `leank` command."""
    command, name, context = get_command(cli.app), "leank", None
    while True:
        context = command.make_context(name, list(words), parent=context)
        if not hasattr(command, "resolve_command"):
            return
        rest = [*context._protected_args, *context.args]
        name, command, words = command.resolve_command(context, rest)


def read_vllm(words):
    from vllm_leank.serving.line import parse_words

    assert words[0] == "serve"
    assert parse_words(words[1:]).attention_backend == "leank"


def read_python(words):
    """A script or module of ours knows the options; no other one is named."""
    if words[0] == "-m":
        path = REPO / "benchmarks" / (words[1].replace(".", "/") + ".py")
        words = words[1:]
    else:
        path = REPO / words[0]
    text = path.read_text()
    for part in ast.parse(text).body:  # options that several programs share
        if isinstance(part, ast.ImportFrom) and part.module.startswith(("real.", "recall.")):
            text += (REPO / "benchmarks" / (part.module.replace(".", "/") + ".py")).read_text()
    # Words with spaces are options of another program, in quotes.
    for flag in (word for word in words[1:] if word.startswith("--") and " " not in word):
        assert f'"{flag}"' in text, flag


def read_other(program, words):
    """Programs that are not ours: what they name is there."""
    if program == "pip":
        assert words.pop(0) == "install"
        for one in words:
            assert one.startswith(".") or Requirement(one)
    elif program == "make":
        for target in words:
            assert re.search(rf"^{target}:", (REPO / "Makefile").read_text(), re.MULTILINE)
    elif program == "pytest":
        assert all((REPO / word).is_file() for word in words)
    elif program == "curl":
        json.loads(words[words.index("-d") + 1])
    elif program in ("torchrun", "accelerate"):
        read_leank_start(words[words.index("leank") + 1 :])
    elif program == "docker":
        assert all((REPO / word).is_file() for word in words if word.startswith("examples/"))
    elif program == "sh":
        assert (REPO / words[0]).is_file()
    else:
        assert program == "export", f"{program}: say how a test checks it"
        assert re.fullmatch(r"\w+=\S+", words[0])


def read_leank_start(words):
    """A command whose end is left out by dots."""
    assert words[-1] == "..."
    command = get_command(cli.app)
    for word in words[:-1]:
        command = command.commands[word]


@pytest.fixture
def in_place(tmp_path, monkeypatch):
    """The files that commands name, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    for name in ("mask.yaml", "a.yaml", "b.yaml", "A.yaml", "B.yaml"):
        save_mask(random_mask(MODEL, [64, 32], align=32), name)
    Path("heads.tsv").write_text("1\t0\n" * 6)
    torch.save(torch.ones(6, 2, 128), "MASK.pth")


def is_run(words):
    return words[0] == "leank" and " ".join(words[1:]).startswith(RUN)


def test_the_line_that_the_demo_prints_does_what_the_demo_does():
    command, environment = ["/a b/vllm", "serve", "m", "--x", '{"y": 1}'], {"SPACE": "1"}
    line = to_copy(command, environment)
    done = subprocess.run(
        ["sh", "-c", line.replace(shlex.quote(command[0]), f"{sys.executable} -c {SHOW} vllm")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["1", repr(command[1:])]


SHOW = shlex.quote("import os, sys; print(os.environ['SPACE']); print(sys.argv[2:])")


@pytest.mark.parametrize("line", COMMANDS)
def test_commands(line, request):
    words = shlex.split(line, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    words = filled(words)
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if is_run(words) and "benchmarks/shapes" not in line:  # needs the file of LeanK's authors
        request.getfixturevalue("in_place")
        if "--out" in rest and "--overwrite" not in rest:
            rest.append("--overwrite")  # several commands of a page write mask.yaml
        code, _, err = request.getfixturevalue("leank")(*rest)
        assert code == 0, err
    elif program == "leank":
        read_leank(rest)
    elif program == "vllm":
        read_vllm(rest)
    elif program == "python":
        read_python(rest)
    else:
        read_other(program, rest)


@pytest.mark.parametrize(
    "line", ["leank mask make", "leank plan --bit 2", "vllm serve MODEL", "frobnicate", "make tes"]
)
def test_a_wrong_command_is_found(line, request):
    with pytest.raises((Exception, SystemExit)):
        test_commands(line, request)
