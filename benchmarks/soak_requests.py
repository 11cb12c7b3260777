"""The requests that `soak.py` sends, and those of them whose answers are known."""

import random
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from soak_client import Answer, Difference, compare
from tqdm import tqdm

PREFIXES = 4
"""Common beginnings of prompts."""

STEPS = 0.125, 0.25, 0.5, 1, 2, 4, 8
"""Nats; told is how many answers differ by more than each."""

SHOWN = 8
"""Tokens that are told of an answer that changed."""


class Prompts:
    """Random requests.

    Args:
        rng: draws them.
        vocabulary: token ids are below this.
        prompt_tokens: of the longest prompt.
        output_tokens: of the longest answer.
    """

    def __init__(
        self, rng: random.Random, vocabulary: int, prompt_tokens: int, output_tokens: int
    ) -> None:
        self._rng, self._vocabulary = rng, vocabulary
        self._longest, self._longest_answer = prompt_tokens, output_tokens
        self._prefixes = [self.ids(prompt_tokens // 2) for _ in range(PREFIXES)]

    def ids(self, count: int) -> list[int]:
        """Token ids."""
        return [self._rng.randrange(10, self._vocabulary) for _ in range(count)]

    def draw(self, shared: float) -> tuple[list[int], int]:
        """A prompt, with a common beginning in `shared` of all cases, and the answer's tokens."""
        longest = self._longest
        length = max(int(longest ** self._rng.uniform(0.3, 1)), 1)
        prompt = self.ids(length)
        if self._rng.random() < shared:
            prompt = (self._rng.choice(self._prefixes)[:length] + prompt)[:longest]
        return prompt, self._rng.randint(1, self._longest_answer)


class Watched:
    """Requests whose answers are known.

    Args:
        prompts: draws them: half have a common beginning.
        count: how many.
    """

    def __init__(self, prompts: Prompts, count: int) -> None:
        self.requests = [prompts.draw(shared=0.5) for _ in range(count)]
        self.answers: list[Answer] = []
        self.differences: list[tuple[int, list[int], Difference]] = []

    async def ask_alone(
        self, ask: Callable[[str, list[int], int], Awaitable[Answer | None]], until: float
    ) -> None:
        """Get the answers by `ask`, one after the other; of as many as there is time for before the
        clock shows `until`. Those that get none are left out.
        """
        requests, self.requests = self.requests, []
        for number, (prompt, tokens) in enumerate(tqdm(requests, desc="alone", unit="")):
            if time.monotonic() > until:
                return
            answer = await ask(f"alone {number}", prompt, tokens)
            if answer is not None:
                self.requests.append((prompt, tokens))
                self.answers.append(answer)

    def add(self, number: int, answer: Answer) -> None:
        """Take an answer that came under load."""
        self.differences.append((number, answer.tokens, compare(self.answers[number], answer)))

    def found(self, tie: float) -> dict[str, Any]:
        """Counts, and how large the differences were."""
        found = [one for *_, one in self.differences]
        drifts = [drift for one in found for drift in one.drifts]
        gaps = [one.gap for one in found if one.gap is not None]
        changed = [one for one in self.differences if not one[-1].size <= tie]
        changed.sort(key=lambda one: one[-1].size, reverse=True)
        return {
            "asked_alone": len(self.answers),
            "compared": len(found),
            "equal": len(found) - len(gaps),
            "ties": sum(one.gap is not None and one.size <= tie for one in found),
            "changed": len(changed),
            "tie": tie,
            "differ_by_more_than": {
                f"{step:g}": sum(not one.size <= step for one in found) for step in STEPS
            },
            "largest_gap": max(gaps, default=0.0),
            "median_gap": statistics.median(gaps) if gaps else 0.0,
            "mean_drift": statistics.fmean(drifts) if drifts else 0.0,
            "largest_drift": max(drifts, default=0.0),
            "changed_most": [self._told(*one) for one in changed[:20]],
        }

    def _told(self, number: int, tokens: list[int], one: Difference) -> dict[str, Any]:
        """Of an answer that changed: by how much, and what it says from its worst token on."""
        there = slice(one.worst, one.worst + SHOWN)
        return {
            "by": one.size,
            "request": number,
            "prompt_tokens": len(self.requests[number][0]),
            "token": one.worst,
            "quiet": self.answers[number].tokens[there],
            "now": tokens[there],
        }
