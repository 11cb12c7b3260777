"""What a calibration reads: prompts of a file, or those that every machine has."""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_leank.core.window import GRANULE, Window
from vllm_leank.errors import UserError, printable
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.builtin_prompts import Named, builtin_prompts
from vllm_leank.offline.fisher import QUERIES, far_prompts
from vllm_leank.offline.known_tokens import reader
from vllm_leank.offline.prompts import read_samples

FROM_DATA, BUILT_IN = 64, 16
"""How many prompts are read when it is not said."""

ON_GPU, ON_CPU = 32768, 2048
"""Longest prompt when it is not said."""

_UNREAD = 0.5
"""Share of one token among all, from which on a tokenizer does not know a text."""

_SHORTEST = 8
"""The longest built-in prompt is so many times as long as the shortest."""


@dataclass(frozen=True)
class CalibrationPrompts:
    """Token ids of prompts, and where they are from, for a mask's provenance."""

    ids: list[list[int]]
    source: dict[str, Any]

    @property
    def provenance(self) -> dict[str, Any]:
        """What a mask's provenance says of them."""
        lengths = [len(one) for one in self.ids]
        return self.source | {
            "prompts": len(lengths),
            "tokens": sum(lengths),
            "longest_prompt": max(lengths),
        }

    def with_far(self, window: Window) -> "CalibrationPrompts":
        """Those that have far tokens for their last ones, which alone tell what these cost.

        Raises:
            UserError: there are none.
        """
        return replace(self, ids=far_prompts(self.ids, window))

    def __str__(self) -> str:
        source = "built-in prompts" if self.source["data"] == "built-in" else "prompts"
        lengths = sorted(map(len, self.ids))
        return f"{len(self.ids)} {source} of {lengths[0]:,} to {lengths[-1]:,} tokens"


def longest_prompt(checkpoint: Checkpoint, limit: int | None, device: str) -> int:
    """`limit`, by default what the device reads in minutes, but no more than the model serves."""
    if limit is None:
        limit = ON_CPU if device.startswith("cpu") else ON_GPU
    return checkpoint.max_tokens(limit)


def least_prompt(window: Window) -> int:
    """Tokens that the shortest built-in prompt has: a few far ones for each of its last."""
    return window.sink + window.recent + QUERIES + 4 * GRANULE


def calibration_prompts(
    checkpoint: Checkpoint,
    data: Path | None,
    window: Window,
    *,
    max_tokens: int,
    count: int | None = None,
    seed: int = 0,
) -> CalibrationPrompts:
    """The first `count` prompts of a JSONL file (`read_samples`), or as many built-in ones, with
    their answers.

    Prompts of a file are cut to their last `max_tokens`; built-in ones have lengths up to it.

    Raises:
        UserError: the file cannot be used, or `max_tokens` leaves no far tokens.
    """
    if data is not None:
        digest = hashlib.sha256()
        samples = read_samples(
            data,
            reader(checkpoint, checkpoint.encode),
            reader(checkpoint, checkpoint.encode_rest),
            vocab_size=checkpoint.config.vocab_size,
            max_samples=count or FROM_DATA,
            max_tokens=max_tokens,
            room=0,
            digest=digest,
        )
        source = {"data": printable(data.name), "data_sha256": digest.hexdigest()}
    else:
        named = built_in_samples(checkpoint, window, max_tokens, count or BUILT_IN, seed)
        samples = [sample for _, sample in named]
        source = {"data": "built-in"}
    ids = [sample.prompt + sample.answer for sample in samples]
    return CalibrationPrompts(ids, source | {"max_tokens": max_tokens})


def built_in_samples(
    checkpoint: Checkpoint,
    window: Window,
    max_tokens: int,
    count: int,
    seed: int,
    min_tokens: int | None = None,
) -> list[Named]:
    """Built-in prompts with lengths up to `max_tokens` from an eighth of it or `min_tokens`, all
    with far tokens.

    Raises:
        UserError: `max_tokens` leaves no far tokens, or the tokenizer does not know the texts.
    """
    least = least_prompt(window)
    if max_tokens < least:
        raise UserError(
            f"built-in prompts of {max_tokens} tokens have hardly any far ones; with sink "
            f"{window.sink} and recent {window.recent} give at least --max-tokens {least}"
        )
    named = builtin_prompts(
        checkpoint,
        count,
        min_tokens=max(least, min_tokens or max_tokens // _SHORTEST),
        max_tokens=max_tokens,
        seed=seed,
    )
    _check_readable(checkpoint, [sample.prompt + sample.answer for _, sample in named])
    return named


def _check_readable(checkpoint: Checkpoint, ids: list[list[int]]) -> None:
    """Refuse texts that a tokenizer makes unknown tokens of, as one of a small vocabulary does.

    Raises:
        UserError: most tokens are one and the same.
    """
    counts = Counter(token for one in ids for token in one)
    ((token, count),) = counts.most_common(1)
    share = count / counts.total()
    if share > _UNREAD:
        raise UserError(
            f"{checkpoint.path}: its tokenizer does not know the built-in prompts, {share:.0%} of "
            f"which are token {token}; write prompts of the model's own kind to a file, and give "
            "it to `leank mask calibrate`, `mask learn` or `serve` with --data"
        )
