"""Long contexts with facts in them, and questions about the facts.

A model reads a context once and is asked several questions about it, each as if it were the only
one. All facts lie among the far tokens. Kinds differ in how hard they are, since a model can only
lose what it knows: an answer says something of a mask where dense attention has it right.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.known_tokens import check_known
from vllm_leank.offline.local_texts import Texts, prose
from vllm_leank.offline.needles import fit
from vllm_leank.offline.tasks import NOISE, PLACES, essay_pieces, uuid_pairs

QUESTIONS = 8
"""Asked about one context."""

ROOM = 160
"""Tokens for a question and its answer."""


class Question(NamedTuple):
    """Token ids of a question, which ends the prompt, and of the answer that continues it."""

    question: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Haystack:
    """Token ids of a context, and questions that may follow it."""

    kind: str
    context: list[int]
    questions: list[Question]


class Facts(NamedTuple):
    """A text, and the beginning and end of sentences that are true of it."""

    text: str
    known: list[tuple[str, str]]


Kind = Callable[[np.random.Generator, int, float, float], Facts]
"""Makes a text of so many pieces, with facts between two shares of its length."""


def values_among_keys(rng: np.random.Generator, size: int, low: float, high: float) -> Facts:
    """Lines `uuid: uuid`, of which any may be asked for."""
    pairs = uuid_pairs(rng, size)
    asked = sorted({round(place) for place in _places(rng, low * (size - 1), high * (size - 1))})
    text = "".join(f"{left}: {right}\n" for left, right in pairs)
    known = [(f"The value of {pairs[i][0]} is", f" {pairs[i][1]}") for i in asked]
    return Facts(f"Keys and their values:\n\n{text}", known)


def numbers_in_prose(rng: np.random.Generator, size: int, low: float, high: float) -> Facts:
    """Help texts and licences, and between their sentences numbers of seven digits."""
    return _with_numbers(rng, size, low, high, digits=7)


def short_numbers_in_prose(rng: np.random.Generator, size: int, low: float, high: float) -> Facts:
    """The same with numbers of four digits."""
    return _with_numbers(rng, size, low, high, digits=4)


KINDS: dict[str, Kind] = {
    "value among keys": values_among_keys,
    "number in prose": numbers_in_prose,
    "short number in prose": short_numbers_in_prose,
}
"""From hard to easy."""


def haystack(
    checkpoint: Checkpoint, window: Window, kind: str, tokens: int, seed: Sequence[int]
) -> Haystack:
    """A context of `kind` that has at most `tokens` tokens together with a question and its answer.

    Raises:
        UserError: there is no tokenizer, it lacks tokens for such text, or too few are allowed.
    """
    # From the sink's end to where even the first token of the context's end is far.
    low, high = window.sink / tokens, 1 - (window.recent + 31 + ROOM) / tokens
    if high <= low:
        raise UserError(f"contexts of {tokens} tokens have no room for far needles")

    def make(size: int) -> tuple[list[int], Facts]:
        facts = KINDS[kind](np.random.default_rng(seed), size, low, high)
        return checkpoint.encode(facts.text), facts

    context, facts = fit(make, lambda made: len(made[0]), tokens - ROOM)
    questions = [
        Question(checkpoint.encode_rest(f"\n\n{start}"), checkpoint.encode_rest(rest))
        for start, rest in facts.known
    ]
    check_known(checkpoint, context)
    for question, answer in questions:
        check_known(checkpoint, question + answer, most=0)
    return Haystack(kind, context, questions)


def _with_numbers(
    rng: np.random.Generator, size: int, low: float, high: float, digits: int
) -> Facts:
    """Sentences, and between them numbers of places."""
    least = 10 ** (digits - 1)
    numbers = rng.choice(9 * least, size=QUESTIONS, replace=False) + least
    named = list(zip(rng.choice(PLACES, QUESTIONS, replace=False), numbers, strict=True))
    pieces = list(itertools.islice(_sentences(rng), size))
    places = _places(rng, low * size, high * size)
    for place, (name, number) in reversed(list(zip(places, named, strict=True))):
        pieces.insert(round(place), f"The number of {name} is {number}. ")
    known = [(f"The number of {name} is", f" {number}") for name, number in named]
    return Facts("".join(pieces).rstrip(), known)


def _sentences(rng: np.random.Generator) -> Iterator[str]:
    """Prose that calibration does not read, without end; filler where the machine has none."""
    texts = Texts(prose(), held_out=True)
    if not texts:
        return itertools.cycle(NOISE)
    return (piece for text in texts.pieces(rng) for piece in essay_pieces(text))


def _places(rng: np.random.Generator, low: float, high: float) -> list[float]:
    """Spread between two numbers, ascending, one in each of as many equal parts."""
    return [low + (high - low) * (i + rng.random()) / QUESTIONS for i in range(QUESTIONS)]
