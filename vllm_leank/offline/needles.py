"""Generated tasks as samples of a wanted number of tokens, over any tokenizer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.offline.prompts import Sample, Tokenize
from vllm_leank.offline.tasks import Exercise, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Generated:
    """Samples of `tasks` in turn, of `min_tokens` to `max_tokens` with their answers.

    Every doubling of the length is equally likely. A sample is as long as its whole pieces of text
    allow.
    """

    tasks: Sequence[Task]
    tokenize: Tokenize
    tokenize_answer: Tokenize
    min_tokens: int
    max_tokens: int
    seed: int

    def __call__(self, number: int) -> Sample:
        """Sample `number`.

        Raises:
            UserError: a length leaves no room for the question.
        """
        task = self.tasks[number % len(self.tasks)]
        rng = np.random.default_rng([self.seed, number])
        low, high = math.log(self.min_tokens), math.log(self.max_tokens)
        length = math.floor(math.exp(rng.uniform(low, high)) + 1e-6)
        seed = int(rng.integers(1 << 62))
        return self._fitted(lambda size: task(np.random.default_rng(seed), size), length)

    def _fitted(self, make: Callable[[int], Exercise], length: int) -> Sample:
        def sample(size: int) -> Sample:
            exercise = make(size)
            return Sample(self.tokenize(exercise.prompt), self.tokenize_answer(exercise.answer))

        return fit(sample, lambda made: len(made.prompt) + len(made.answer), length)


UNREAD = (
    "the model's tokenizer does not know the built-in prompts: longer ones have no more tokens; "
    "write prompts of the model's own kind to a file, and give it with --data"
)

FULL = 0.95
"""Share of the wanted tokens that is near enough."""


def fit(make: Callable[[int], T], count: Callable[[T], int], tokens: int) -> T:
    """What `make` gives for so many pieces that it has nearly `tokens` tokens, and no more.

    More pieces have more tokens, of which `count` tells the number.

    Raises:
        UserError: not even one piece fits, or more pieces have no more tokens.
    """
    small, large = count(make(8)), count(make(24))
    if large <= small:
        raise UserError(UNREAD)
    per_piece = max(1, (large - small) / 16)
    size = max(1, 8 + math.floor((tokens - small) / per_piece))
    best, fits, exceeds = None, 0, math.inf
    while fits + 1 < exceeds:
        found = make(size)
        if (length := count(found)) <= tokens:
            best, fits = found, size
            if length >= FULL * tokens:
                break
        else:
            exceeds = size
        size += math.floor((tokens - length) / per_piece)
        if not fits < size < exceeds:
            # Pieces are not as long as the first ones.
            size = 2 * fits if exceeds == math.inf else (fits + int(exceeds)) // 2
    if best is None:
        raise UserError(f"{tokens} tokens have no room for a question; samples must be longer")
    return best


def least_tokens(window: Window) -> int:
    """Tokens from which a request has far ones."""
    length = window.sink + window.recent
    while window.boundary(length) == window.sink:
        length += 1
    return length
