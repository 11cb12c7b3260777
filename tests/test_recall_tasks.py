"""The recall tasks: seeded, of exact length, solvable from the prompt, readable as text."""

import re

import numpy as np
import pytest
from recall import vocab
from recall.stream import KINDS, make_batch
from recall.tasks import GROUP, TASKS, make_row, make_sample

NAMES = vocab.tokens()
LENGTHS = (96, 1000, 4096)


def text(token_ids):
    return " ".join(NAMES[i] for i in token_ids)


def solve(prompt: str) -> str:
    """Answer a prompt from its text alone."""
    haystack, question, key = re.fullmatch(
        r"<s> (.*) (what is|list all|trace) (\w+) =", prompt
    ).groups()

    def find(name, words):
        return re.findall(rf"(?<!\S){name} = ((?:\w+ ){{{words}}})\.", haystack)

    if question == "what is":
        (value,) = find(key, 4)
        return f"{value}. </s>"
    if question == "list all":
        return f" . {key} = ".join(value.strip() for value in find(key, 2)) + " . </s>"
    chain = []
    while not key.isdigit():
        (value,) = find(key, 1)
        key = value.strip()
        chain.append(key)
    return " = ".join(chain) + " . </s>"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
def test_answer_follows_from_prompt(task, length):
    for seed in range(20):
        sample = make_sample(task, length, seed)
        assert solve(text(sample.prompt_token_ids)) == text(sample.answer_token_ids)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
def test_sample_has_exactly_the_length(task, length):
    sample = make_sample(task, length, 0)
    assert len(sample.prompt_token_ids) + len(sample.answer_token_ids) == length
    assert len(sample.answer_token_ids) == TASKS[task].answer_tokens
    assert sample.prompt_token_ids[0] == vocab.BOS
    assert sample.answer_token_ids[-1] == vocab.EOS


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_seeded_and_splits_differ(task):
    assert make_sample(task, 200, 3) == make_sample(task, 200, 3)
    assert make_sample(task, 200, 3) != make_sample(task, 200, 4)
    held_out = {tuple(make_sample(task, 200, seed).prompt_token_ids) for seed in range(100)}
    seen = {tuple(make_sample(task, 200, seed, "train").prompt_token_ids) for seed in range(100)}
    assert len(held_out) == len(seen) == 100
    assert not held_out & seen


def test_haystacks_are_as_dense_as_documented():
    def statements(task):
        return make_sample(task, 4096, 0).prompt_token_ids.count(vocab.EQUALS)

    assert statements("multikey") == (4096 - 11) // 7 + 1
    assert statements("multivalue") > 100 * GROUP
    assert statements("tracking") > 120 * GROUP


def test_too_short_a_length_is_refused():
    with pytest.raises(ValueError, match="40 tokens have no room"):
        make_sample("multivalue", 40, 0)


def test_ordinals_count_the_values_of_a_key():
    row = make_row(TASKS["multivalue"], 1024, np.random.default_rng(0), 0.5, questions=3)
    values = {}
    for place in np.flatnonzero(row.ordinal >= 0):
        key, first = row.tokens[place - 1], row.tokens[place + 1]
        assert values.setdefault((key, row.ordinal[place]), first) == first
    assert np.bincount(row.ordinal[row.ordinal >= 0]).tolist() == [len(values) // GROUP + 3] * GROUP


def test_batch_points_at_the_tokens_to_predict():
    rng = np.random.default_rng(0)
    for periodic in (0.0, 1.0):
        batch = make_batch(rng, tokens=8192, max_length=512, periodic=periodic)
        flat = batch.tokens.ravel()
        assert (flat[batch.source + 1] == batch.target).all()
        assert (flat[batch.ordinal_source] == vocab.EQUALS).all()
        assert set(batch.kind) <= ({KINDS.index("periodic")} if periodic else {0, 1, 2})


def test_vocabulary_is_readable_and_unique():
    assert len(set(NAMES)) == vocab.VOCAB_SIZE
    assert all(re.fullmatch(r"[a-z]{4}", NAMES[i]) for i in vocab.WORDS)
    assert all(re.fullmatch(r"[1-9]\d\d", NAMES[i]) for i in vocab.NUMBERS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from recall.text import save_tokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, model_max_length=32768)
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("task", TASKS)
def test_text_round_trips(task, tokenizer):
    sample = make_sample(task, 300, 0)
    prompt = tokenizer.decode(sample.prompt_token_ids, skip_special_tokens=True)
    assert tokenizer(prompt)["input_ids"] == sample.prompt_token_ids
    answer = tokenizer.decode(sample.answer_token_ids, skip_special_tokens=True)
    assert answer == text(sample.answer_token_ids[:-1])
