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
        self.differences: list[tuple[int, Difference]] = []

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
        self.differences.append((number, compare(self.answers[number], answer)))

    def found(self, tie: float) -> dict[str, Any]:
        """Counts, and how large the differences were."""
        drifts = [drift for _, one in self.differences for drift in one.drifts]
        gaps = [one.gap for _, one in self.differences if one.gap is not None]
        sizes = [(one.size, number) for number, one in self.differences]
        changed = sorted((pair for pair in sizes if not pair[0] <= tie), reverse=True)
        ties = sum(one.gap is not None and one.size <= tie for _, one in self.differences)
        return {
            "asked_alone": len(self.answers),
            "compared": len(self.differences),
            "equal": len(self.differences) - len(gaps),
            "ties": ties,
            "changed": len(changed),
            "tie": tie,
            "largest_gap": max(gaps, default=0.0),
            "median_gap": statistics.median(gaps) if gaps else 0.0,
            "mean_drift": statistics.fmean(drifts) if drifts else 0.0,
            "largest_drift": max(drifts, default=0.0),
            "changed_most": [
                {"by": size, "request": number, "prompt_tokens": len(self.requests[number][0])}
                for size, number in changed[:20]
            ],
        }
