"""Prompts for calibration: of the lengths asked for, the same each time, others when held out."""

from types import SimpleNamespace

import pytest
import transformers

from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.builtin_prompts import builtin_prompts
from vllm_leank.offline.written_prompts import OPENINGS, written_prompts


class Letters:
    """A checkpoint whose tokens are bytes."""

    tokenizer = SimpleNamespace(
        chat_template="{{ messages }}",
        apply_chat_template=lambda messages, **options: f"<user>{messages[0]['content']}<model>",
    )

    def encode(self, text):
        return list(text.encode())

    encode_rest = encode
    encode_question = Checkpoint.encode_question


def texts(prompts):
    return [bytes(sample.prompt + sample.answer) for _, sample in prompts]


def test_kinds_and_lengths_are_spread():
    prompts = builtin_prompts(Letters(), 12, min_tokens=1000, max_tokens=8000)
    kinds = [kind for kind, _ in prompts]
    assert kinds == ["questions", "python", "tables", "prose"] * 3
    lengths = [len(text) for text in texts(prompts)]
    assert lengths[0] > 7800
    assert all(900 < length <= 8000 for length in lengths)
    assert min(lengths) < 2000
    assert all(sample.answer for _, sample in prompts)
    assert b"<user>" in texts(prompts)[0]


def test_prompts_are_the_same_each_time_and_others_when_held_out():
    options = {"min_tokens": 1000, "max_tokens": 4000}
    first, again = (texts(builtin_prompts(Letters(), 8, **options)) for _ in range(2))
    assert first == again
    assert len({*first, *texts(builtin_prompts(Letters(), 8, **options, held_out=True))}) == 16
    assert len({*first, *texts(builtin_prompts(Letters(), 8, **options, seed=1))}) == 16


def test_lengths_must_make_sense():
    with pytest.raises(UserError, match="the shortest prompt has 9 tokens"):
        builtin_prompts(Letters(), 1, min_tokens=9, max_tokens=8)


def test_a_model_writes_texts_of_its_own(tiny_llama_dir):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    first, again = (texts_of_model(model, seed=0) for _ in range(2))
    assert first == again
    assert first != texts_of_model(model, seed=1)
    for (kind, sample), opening in zip(first, OPENINGS, strict=False):
        assert kind == "written"
        assert len(sample.prompt) + len(sample.answer) == 100
        assert sample.prompt[:5] == list(opening.encode())[:5]


def texts_of_model(model, seed):
    return written_prompts(model, Letters(), 2, tokens=100, seed=seed)
