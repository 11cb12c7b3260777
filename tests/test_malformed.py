"""Malformed masks, options and prompts: each is read or refused with one sentence, soon, and in
little memory; nothing else happens.

`LEANK_MALFORMED=20` plays twenty times as many. Malformed requests are in test_serve.py.
"""

import os
import time
from functools import cache
from pathlib import Path

import pytest
from malformed import large_masks, masks, options, prompts
from mask_samples import packed_mask

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.options import OptionError, parse_options
from vllm_leank.errors import UserError
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.file import MAX_BYTES, load_mask, save_mask
from vllm_leank.mask.lookup import broken_masks, resolve_mask
from vllm_leank.mask.text import dump_mask, parse_mask
from vllm_leank.offline.prompts import MAX_LINE, read_samples

STEPS, MEGABYTES, CHARACTERS = 30_000_000, 500, 1000
"""What a refusal may take, of time (below) and of memory, and how long it may be."""

MASK = packed_mask(Geometry(2, 2, 128, 1e4, None))
TIMES = int(os.environ.get("LEANK_MALFORMED", "1"))


@cache
def seconds():
    """What a refusal may take of a processor's time: that of so many steps of an empty loop, about
    a second on most machines, so that a slow machine is no failure and a reader in n**2 is one.
    """
    began = time.thread_time()
    for _ in range(STEPS // 10):
        pass
    return 10 * (time.thread_time() - began)


def refusal(read, given, error=UserError):
    """The sentence with which something is refused, or nothing; other errors are not caught."""
    limit, began = seconds(), time.thread_time()
    try:
        read(given)
        said = ""
    except error as refused:
        said = str(refused)
        assert said.strip()
        assert "\n" not in said
        assert len(said) < CHARACTERS
    assert time.thread_time() - began < limit, said
    return said


@pytest.fixture(autouse=True)
def _in_little_memory():
    """The most that the process has held, above what it held before."""
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return

    def held(what):
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(what))
        return int(line.split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # forget the most so far
    before = held("VmRSS")
    yield
    assert held("VmHWM") - before < MEGABYTES


def test_masks(repo):
    text = (repo / "masks/leank/recall.yaml").read_text(encoding="utf-8")
    messages = [refusal(parse_mask, changed, MaskError) for changed in masks(text, 600 * TIMES)]
    assert sum(map(bool, messages)) > 450 * TIMES
    assert not [message for message in messages if "Error" in message]


def test_masks_of_bits():
    text = dump_mask(MASK)
    messages = [refusal(parse_mask, changed, MaskError) for changed in masks(text, 400 * TIMES)]
    assert sum(map(bool, messages)) > 300 * TIMES
    assert not [message for message in messages if "Error" in message]


def test_options():
    given = [{"leank": one} for one in options(400 * TIMES)]
    messages = [refusal(parse_options, one, OptionError) for one in given]
    assert sum(map(bool, messages)) > 300 * TIMES
    assert all("leank" in message for message in messages if message)


LONG = {"positive": 10**5000, "negative": -(10**5000), "list": [10**5000], "key": {"a": 10**5000}}


@pytest.mark.parametrize("given", LONG.values(), ids=LONG)
@pytest.mark.parametrize("name", ["sink", "recent", "mask", "prefill", "archive_dtype"])
def test_options_with_a_number_of_thousands_of_digits(name, given):
    message = refusal(parse_options, {"leank": {name: given}}, OptionError)
    assert f"leank option {name}" in message


def test_large_masks(tmp_path):
    """Of one thing that a reader may be slow or greedy at; all refused."""
    path = tmp_path / "m.yaml"
    for text in large_masks(MAX_BYTES // 8):
        path.write_text(text, encoding="utf-8")
        assert refusal(load_mask, path, MaskError).startswith(f"{path}")


def test_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    limits = {"vocab_size": 64, "max_tokens": 32}

    def tokenize(text):
        return list(text.encode("ascii", "ignore"))

    def without(path):
        return read_samples(path, tokenize, tokenize, max_samples=9, room=0, **limits)

    for data in prompts(300 * TIMES):
        path.write_bytes(data)
        assert refusal(without, path).startswith(f"{path}"), data[:200]
        said = refusal(lambda path: read_samples(path, tokenize, tokenize, **limits), path)
        assert said.startswith(f"{path}"), data[:200]
    path.write_bytes(b" " * (MAX_LINE + 1))
    assert "line 1: longer than" in refusal(without, path)
    path.write_bytes(b'{"prompt_token_ids": [' + b"5," * (MAX_LINE // 3) + b"5]}")
    assert len(without(path)[0].prompt) == 32


def test_bad_files_do_not_stand_in_the_way_of_the_others(tmp_path):
    """Whatever lies in a folder of masks, what is right there is found."""
    text = dump_mask(MASK)
    for number, changed in enumerate(masks(text, 100 * TIMES)):
        (tmp_path / f"{number}.yaml").write_text(changed, encoding="utf-8", errors="replace")
        if not refusal(parse_mask, changed, MaskError):
            (tmp_path / f"{number}.yaml").unlink()
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "a folder.yaml").mkdir()
    (tmp_path / "nowhere.yaml").symlink_to(tmp_path / "nothing")
    (tmp_path / "itself.yaml").symlink_to(tmp_path / "itself.yaml")
    (tmp_path / "up").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / os.fsdecode(b"\xff.yaml")).write_text("a: b")
    save_mask(MASK, tmp_path / "right.yaml")
    found = resolve_mask(None, MASK.model, MASK.geometry, folder=tmp_path)
    assert found.path == tmp_path / "right.yaml"
    assert len(broken_masks(tmp_path)) > 80
    with pytest.raises(MaskError, match="not looked at, as they cannot be read") as refused:
        resolve_mask(None, "org/other", MASK.geometry, folder=tmp_path)
    assert str(refused.value).encode()  # can be printed
