"""The generated training tasks, and samples from files."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.learn.data import Data, Shuffled, with_far_tokens
from vllm_leank.offline.needles import Generated, least_tokens
from vllm_leank.offline.prompts import Sample, read_samples
from vllm_leank.offline.tasks import essay_pieces, multivalue, retrieval

WINDOW = Window(32, 64)


def test_retrieval_asks_for_one_of_many_pairs():
    prompt, answer = retrieval(np.random.default_rng(0), 50)
    pairs = dict(re.findall(r"^(\S{36}): (\S{36})$", prompt, re.M))
    assert len(pairs) == 50
    (key,) = re.findall(r"The value of (\S{36}) is$", prompt)
    assert answer == f" {pairs[key]}"
    assert retrieval(np.random.default_rng(0), 50) == (prompt, answer)
    assert retrieval(np.random.default_rng(1), 50) != (prompt, answer)


@pytest.mark.parametrize("filler", [None, essay_pieces("An essay. " + "x" * 900 + "! Its end.")])
def test_multivalue_asks_for_all_numbers_of_its_key_in_order(filler):
    options = {} if filler is None else {"filler": filler}
    prompt, answer = multivalue(np.random.default_rng(3), 60, **options)
    found = re.findall(r"One of the numbers of (\w+) is (\d{7})\.", prompt)
    assert len({key for key, _ in found}) == 1
    assert len({number for _, number in found}) == 4
    assert answer == " " + ", ".join(number for _, number in found) + "."
    if filler is not None:
        assert max(map(len, filler)) <= 402
        assert "".join(filler).replace(" ", "") == "Anessay." + "x" * 900 + "!Itsend."


def test_generated_samples_take_turns_and_fill_their_length():
    tokenizer = byte_tokenizer()
    source = Generated(
        (retrieval, multivalue),
        tokenizer.encode,
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        1000,
        3000,
        seed=5,
    )
    samples = [source(number) for number in range(20)]
    assert [source(number) for number in (19, 3)] == [samples[19], samples[3]]
    lengths = [len(prompt) + len(answer) for prompt, answer in samples]
    assert 900 < min(lengths) < 1500 < 2000 < max(lengths) <= 3000
    for number, (prompt, answer) in enumerate(samples):
        assert prompt[0] == 256
        assert 256 not in answer
        text = tokenizer.decode(prompt[1:])
        assert ("Keys and their values" in text) == (number % 2 == 0)
    exact = Generated((retrieval,), tokenizer.encode, tokenizer.encode, 2000, 2000, seed=0)(0)
    assert 2000 - 80 < len(exact.prompt) + len(exact.answer) <= 2000
    with pytest.raises(UserError, match="no room for a question"):
        Generated((retrieval,), tokenizer.encode, tokenizer.encode, 60, 60, seed=0)(0)


def test_a_list_is_gone_through_in_changing_order():
    samples = [Sample([i], [i]) for i in range(10)]
    source = Shuffled(samples, seed=0)
    epochs = [[source(10 * epoch + i) for i in range(10)] for epoch in range(3)]
    assert all(sorted(epoch) == samples for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_samples_without_far_tokens_are_left_out():
    assert least_tokens(WINDOW) == 128
    short, far = Sample([0] * 120, [0] * 7), Sample([0] * 120, [0] * 8)
    assert with_far_tokens([short, far, short], WINDOW) == [far]
    with pytest.raises(UserError, match="must have 128 tokens"):
        with_far_tokens([short], WINDOW)


def write(path, *lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def read(path, max_tokens=10):
    return read_samples(
        path,
        lambda text: [0, *map(len, text.split())],
        lambda text: [*map(len, text.split())],
        vocab_size=97,
        max_tokens=max_tokens,
    )


def test_samples_of_a_file(tmp_path):
    path = write(
        tmp_path / "s.jsonl",
        '{"prompt_token_ids": [1, 2, 3, 4], "answer_token_ids": [5]}',
        "",
        '{"prompt": "one three", "answer": "fifteen", "more": 0}',
    )
    assert read(path) == [([1, 2, 3, 4], [5]), ([0, 3, 5], [7])]
    assert read(path, max_tokens=3) == [([3, 4], [5]), ([3, 5], [7])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', 'one of "answer_token_ids" and "answer"'),
        ('{"answer": "a"}', 'one of "prompt_token_ids" and "prompt"'),
        ('{"prompt": "a", "answer": ""}', "the answer is empty"),
        ('{"prompt": "a", "answer": 7}', '"answer" must be text'),
        ('{"prompt": "a", "answer_token_ids": [97]}', "97 is no token id"),
        (json.dumps({"prompt": "a", "answer": "b " * 10}), "answer has 10 tokens"),
    ],
)
def test_bad_samples_are_refused_with_the_line(tmp_path, line, message):
    path = write(tmp_path / "s.jsonl", '{"prompt": "good", "answer": "good"}', line)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_text_files_must_have_text(tmp_path):
    class Checkpoint:
        max_tokens = staticmethod(lambda limit: limit)
        encode = encode_rest = staticmethod(lambda text: [1] * len(text.split()))
        tokenizer = SimpleNamespace(unk_token_id=None)

    def open_text(path):
        return Data(text=path, generated=True).open(Checkpoint(), WINDOW, 0)

    source, held_out, told = open_text(write(tmp_path / "a.txt", "Some prose."))
    assert told["text"] == "a.txt"
    assert len(held_out) == told["held_out"] == 8
    assert source(0) not in held_out
    with pytest.raises(UserError, match="has no text"):
        open_text(write(tmp_path / "b.txt", "   "))
    with pytest.raises(UserError, match="No such file"):
        open_text(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        open_text(tmp_path / "latin.txt")
