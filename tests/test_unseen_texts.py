"""Samples of kinds of text that calibration does not see."""

import pytest
from byte_tokenizer import byte_tokenizer
from real.unseen_texts import unseen_prompts, unseen_texts

from vllm_leank.mask.checkpoint import Checkpoint

TEXT = "".join(f"line {i:03}\n" for i in range(100))


@pytest.fixture
def checkpoint(tiny_llama_dir):
    found = Checkpoint.open(str(tiny_llama_dir))
    found.__dict__["tokenizer"] = byte_tokenizer()
    return found


def test_samples_begin_at_different_lines_and_repeat_nothing(checkpoint):
    found = unseen_prompts(checkpoint, "lines", TEXT, 3, 300, seed=0)
    texts = []
    for kind, sample in found:
        assert kind == "lines"
        assert (len(sample.prompt), len(sample.answer)) == (236, 64)
        texts.append(checkpoint.tokenizer.decode((sample.prompt + sample.answer)[1:]))
    assert len(set(texts)) == 3
    for text in texts:
        lines = text.splitlines()[:33]
        assert len(set(lines)) == len(lines) == 33
        assert all(len(line) == 8 for line in lines)


def test_a_text_that_is_too_short_gives_none(checkpoint):
    assert not unseen_prompts(checkpoint, "lines", TEXT, 3, len(TEXT) + 2, seed=0)
    assert not unseen_prompts(checkpoint, "none", "", 3, 10, seed=0)


def test_texts_come_from_a_folder_or_the_machine(tmp_path):
    (tmp_path / "klingon.txt").write_text("nuqneH\n", encoding="utf-8")
    assert unseen_texts(tmp_path) == {"klingon": "nuqneH\n"}
    texts = unseen_texts()
    assert set(texts) == {"french", "russian", "chinese", "perl", "c++"}
    assert len(texts["c++"]) == 1 << 20  # torch brings its headers
