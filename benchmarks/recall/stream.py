"""Training batches: rows of many questions, from the generators that also make the samples."""

from dataclasses import dataclass

import numpy as np

from recall.tasks import TASKS, Row, Task, make_row
from recall.vocab import BOS, WORDS

KINDS = ("lookup", "multivalue", "tracking", "periodic")
_TASKS = [TASKS["multikey"], TASKS["multivalue"], TASKS["tracking"]]
_TASK_SHARES = [0.35, 0.35, 0.3]
MIN_LENGTH = 64


@dataclass(frozen=True)
class Batch:
    """`B` rows of `L` tokens, and `n` tokens to predict from `B * L` hidden states.

    `tokens` is `[B, L]`; `source`, `target` and `kind` are `[n]`: the flat position to predict
    from, the token and its index in `KINDS`. `ordinal_source` and `ordinal` are `[m]`: the flat
    positions of `=` in multivalue statements and which value follows.
    """

    tokens: np.ndarray
    source: np.ndarray
    target: np.ndarray
    kind: np.ndarray
    ordinal_source: np.ndarray
    ordinal: np.ndarray


def make_batch(rng: np.random.Generator, tokens: int, max_length: int, periodic: float) -> Batch:
    """A batch of about `tokens` tokens in rows of one random length up to `max_length`.

    Half of the batches are longer than `max_length / 2`; the other lengths are log-uniform. A
    share `periodic` of the batches holds periodic random sequences in place of the tasks.
    """
    if rng.random() < 0.5:
        length = rng.integers(max_length // 2, max_length + 1)
    else:
        length = np.exp(rng.uniform(np.log(MIN_LENGTH), np.log(max_length)))
    length = max(MIN_LENGTH, int(length) // 8 * 8)
    count = max(1, tokens // length)

    if rng.random() < periodic:
        kinds = np.full(count, KINDS.index("periodic"))
        rows = [_periodic_row(length, rng) for _ in range(count)]
    else:
        kinds = rng.choice(len(_TASKS), size=count, p=_TASK_SHARES)
        rows = [_task_row(_TASKS[kind], length, rng) for kind in kinds]

    is_target = np.stack([row.is_answer for row in rows])[:, 1:]
    ordinals = np.stack([row.ordinal for row in rows]).ravel()
    row, column = np.nonzero(is_target)
    ids = np.stack([row.tokens for row in rows])
    return Batch(
        tokens=ids,
        source=row * length + column,
        target=ids[row, column + 1],
        kind=kinds[row],
        ordinal_source=np.flatnonzero(ordinals >= 0),
        ordinal=ordinals[ordinals >= 0],
    )


def _task_row(task: Task, length: int, rng: np.random.Generator) -> Row:
    """A row of which a tenth to a half is questions, its haystack anything from sparse to full."""
    density = 1.0 if rng.random() < 0.4 else np.exp(rng.uniform(np.log(0.02), 0.0))
    fit = (length - 1) // (task.question_tokens + task.group_tokens)
    wanted = int(rng.uniform(0.1, 0.5) * length) // task.question_tokens
    hidden = int(density * (length - 1 - wanted * task.question_tokens)) // task.group_tokens
    questions = max(1, min(wanted, hidden, fit, task.max_groups))
    return make_row(task, length, rng, density, questions)


def _periodic_row(length: int, rng: np.random.Generator) -> Row:
    """Random words that repeat with a random period: only content tells what comes next."""
    period = rng.integers(8, length // 2 + 1)
    words = rng.choice(WORDS, size=period)
    return Row(
        tokens=np.concatenate([[BOS], np.resize(words, length - 1)]),
        is_answer=np.arange(length) > period + 1,
        ordinal=np.full(length, -1),
    )
