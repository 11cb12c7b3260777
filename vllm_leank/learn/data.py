"""Where a run's samples come from: built-in prompts, generated tasks, or a file of the user's.

A source is called with the number of a sample and gives the same one whenever it is asked, so an
interrupted run goes on with what it would have seen.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_leank.core.bounded import read_bounded
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError, printable
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.calibration_prompts import built_in_samples
from vllm_leank.offline.known_tokens import MOST_OF_A_PROMPT, check_known, reader
from vllm_leank.offline.needles import Generated, least_tokens
from vllm_leank.offline.prompts import Sample, read_samples
from vllm_leank.offline.tasks import Task, essay_pieces, multivalue, retrieval

Source = Callable[[int], Sample]

POOL = 192
"""Built-in samples, gone through again and again."""

HELD_OUT = 8
"""Samples that no step learns from, at most: masks are judged on them."""

NOT_REACHED = 1 << 40
"""Number of the first generated sample that is held out: no run has as many steps."""

MAX_TEXT = 64 << 20
"""Bytes of a file of prose."""


@dataclass(frozen=True)
class Shuffled:
    """The samples of a list, in another order each time it is gone through."""

    samples: Sequence[Sample]
    seed: int

    def __call__(self, number: int) -> Sample:
        """Sample `number`, from 0 without end."""
        epoch, place = divmod(number, len(self.samples))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))
        return self.samples[order[place]]


@dataclass(frozen=True)
class Data:
    """What a run learns on, as its options name it.

    `file` is a JSONL file of prompts with answers. Else samples have `min_tokens` to `max_tokens`:
    built-in prompts, as calibration reads them, or with `generated` LeanK's two tasks; `text` is a
    file of prose for these. Prompts of a file are cut to `max_tokens`.
    """

    file: Path | None = None
    text: Path | None = None
    min_tokens: int = 4096
    max_tokens: int = 32768
    generated: bool = False

    def open(
        self, checkpoint: Checkpoint, window: Window, seed: int
    ) -> tuple[Source, list[Sample], dict[str, Any]]:
        """The source, other samples that are held out of it, and plain values that tell one source
        from another.

        Raises:
            UserError: a file cannot be used, or too few samples would have far tokens.
        """
        max_tokens = checkpoint.max_tokens(self.max_tokens)
        if self.file is not None:
            if self.text is not None:
                raise UserError("--text is for generated samples; --data brings its own")
            digest = hashlib.sha256()
            samples = read_samples(
                self.file,
                reader(checkpoint, checkpoint.encode),
                reader(checkpoint, checkpoint.encode_rest),
                vocab_size=checkpoint.config.vocab_size,
                max_tokens=max_tokens,
                digest=digest,
            )
            far = with_far_tokens(samples, window)
            taught, held_out = without_held_out(far, seed)
            return (
                Shuffled(taught, seed),
                held_out,
                {
                    "data": printable(self.file.name),
                    "data_sha256": digest.hexdigest(),
                    "samples": len(taught),
                    "held_out": len(held_out),
                    "too_short": len(samples) - len(far),
                    "max_tokens": max_tokens,
                },
            )
        if not least_tokens(window) <= self.min_tokens <= max_tokens:
            raise UserError(
                f"--min-tokens is {self.min_tokens}; it must lie between {least_tokens(window)}, "
                f"from where samples have far tokens, and {max_tokens}, the most that --max-tokens "
                "and the model allow"
            )
        if not self.generated:
            if self.text is not None:
                raise UserError("--text is for the generated samples of --from nothing")
            count = POOL + HELD_OUT
            named = built_in_samples(
                checkpoint, window, max_tokens, count, seed, min_tokens=self.min_tokens
            )
            all_samples = [one for _, one in named]  # kinds and lengths in turn
            return (
                Shuffled(all_samples[:POOL], seed),
                all_samples[POOL:],
                {
                    "data": "built-in",
                    "samples": POOL,
                    "held_out": HELD_OUT,
                    "min_tokens": self.min_tokens,
                    "max_tokens": max_tokens,
                },
            )
        second: Task = multivalue
        text: dict[str, str] = {}
        if self.text is not None:
            pieces, text = _essay(self.text)
            second = functools.partial(multivalue, filler=pieces)
        source = Generated(
            (retrieval, second),
            checkpoint.encode,
            checkpoint.encode_rest,
            self.min_tokens,
            max_tokens,
            seed,
        )
        for number in range(2):  # one of each task
            try:
                check_known(checkpoint, source(number).prompt, MOST_OF_A_PROMPT)
            except UserError as error:
                raise UserError(f"generated samples: {error}; give others by --data") from error
        held_out = [source(NOT_REACHED + i) for i in range(HELD_OUT)]
        return (
            source,
            held_out,
            {
                "data": "generated: dense retrieval and multi-value in turn",
                **text,
                "held_out": HELD_OUT,
                "min_tokens": self.min_tokens,
                "max_tokens": max_tokens,
            },
        )


def _essay(path: Path) -> tuple[list[str], dict[str, str]]:
    data = read_bounded(path, MAX_TEXT, "texts")
    try:
        pieces = essay_pieces(data.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
    if not pieces:
        raise UserError(f"{path}: has no text")
    return pieces, {"text": printable(path.name), "text_sha256": hashlib.sha256(data).hexdigest()}


def without_held_out(samples: Sequence[Sample], seed: int) -> tuple[list[Sample], list[Sample]]:
    """The samples to learn from, and those held out: a quarter of them by chance, and no more than
    `HELD_OUT`.

    Raises:
        UserError: there is but one.
    """
    if len(samples) < 2:
        raise UserError(
            "only one sample has far tokens, and one is held out to judge masks by; give more"
        )
    count = min(HELD_OUT, max(1, len(samples) // 4))
    order = np.random.default_rng([seed, len(samples)]).permutation(len(samples))
    held_out = set(order[:count].tolist())
    return (
        [one for i, one in enumerate(samples) if i not in held_out],
        [one for i, one in enumerate(samples) if i in held_out],
    )


def with_far_tokens(samples: Sequence[Sample], window: Window) -> list[Sample]:
    """The samples in whose answers a query has far tokens: others teach nothing.

    Raises:
        UserError: there is none.
    """
    found = [
        sample
        for sample in samples
        if window.boundary(len(sample.prompt) + len(sample.answer)) > window.sink
    ]
    if not found:
        raise UserError(
            f"no sample has far tokens: with sink {window.sink} and recent {window.recent}, prompt "
            f"and answer must have {least_tokens(window)} tokens; give longer ones, or a smaller "
            "sink or recent"
        )
    return found
