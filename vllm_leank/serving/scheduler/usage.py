"""What running requests hold, counted in the scheduler's process for vLLM's statistics."""

import time
from typing import Any, Protocol

from vllm_leank.core.window import GRANULE
from vllm_leank.serving.settings import load_settings

INTERVAL = 0.5
"""Seconds between two counts: nobody scrapes metrics more often, and a count visits every running
request."""


class Compacting(Protocol):
    """What counts the tokens that were given a place in the archive."""

    compacted: int


class Usage:
    """Counts for one scheduler.

    Args:
        scheduler: vLLM's scheduler.
        archive: its manager of archive pages.
    """

    def __init__(self, scheduler: Any, archive: Compacting) -> None:
        settings = load_settings(scheduler.vllm_config)
        self._plan, self._window = settings.plan, settings.window
        self._archive = archive
        self._compacted = 0
        self._next = 0.0

    def count(self, running: list[Any]) -> dict[str, int]:
        """What is held now; nothing where the last count was a moment ago.

        Args:
            running: requests that hold pages. Without any, what they held is always counted.

        Returns:
            `archive` and `window` tokens in use, and `saved` bytes of each tensor-parallel rank
            against a dense cache; pages that requests share count for each. `compacted` tokens are
            those since the last count.
        """
        now = time.monotonic()
        if running and now < self._next:
            return {}
        self._next = now + INTERVAL
        archived = total = blocks = 0
        for request in running:
            tokens = request.num_computed_tokens - request.num_in_flight_tokens
            exact_until = self._window.exact_until(request.num_prompt_tokens)
            archived += len(self._window.free_tokens(tokens, exact_until)) * GRANULE
            total += tokens
            blocks += self._plan.blocks_held(self._window, tokens, exact_until)
        before, self._compacted = self._compacted, self._archive.compacted
        return {
            "archive": archived,
            "window": total - archived,
            "saved": total * self._plan.dense_token_bytes - blocks * self._plan.block_bytes,
            "compacted": self._compacted - before,
        }
