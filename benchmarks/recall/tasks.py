"""Seeded generators of the four recall tasks; numpy only.

A row is `<s> HAYSTACK QUESTION ANSWER`. The haystack holds *statements* between random filler:

    single      one statement `bako = tovi sane lume wiro .`
    multikey    nothing but such statements, each with its own key
    multivalue  groups of four statements `bako = tovi sane .` that share a key
    tracking    chains `bako = 417 .`, `rimu = bako .`, `sane = rimu .`, `lume = sane .`

The question names one key; the answer continues it, ends with `. </s>`, and is written like the
statements it repeats:

    single, multikey   what is bako =  tovi sane lume wiro . </s>
    multivalue         list all bako = tovi sane . bako = lume wiro . bako = ... . bako = ... . </s>
    tracking           trace lume =    sane = rimu = bako = 417 . </s>

Statements stand at random places, those of one group in the order of the answer. In `multivalue`
and `tracking` half of the haystack is statements of many groups, of which one is asked for.
Filler is random words with some numbers and punctuation; `=` occurs in it too, but never next to
a word that is a key or the first word of a value. These words are unique in a row, so every answer
is determined by the prompt.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from recall.vocab import (
    ALL,
    BOS,
    COMMA,
    EOS,
    EQUALS,
    IS,
    LIST,
    NUMBERS,
    STOP,
    TRACE,
    VOCAB_SIZE,
    WHAT,
    WORDS,
)

Split = Literal["eval", "train"]

GROUP = 4
"""Values of one `multivalue` key, and variables of one `tracking` chain."""

_SPLITS = {"train": 0, "eval": 1}
_FILLER = ((0.08, None), (0.04, STOP), (0.03, COMMA), (0.03, EQUALS))  # share, token (None: number)


@dataclass(frozen=True)
class Task:
    """The fixed sizes of a task, in tokens.

    `density` is the share of an evaluation haystack that is statements (0: one statement).
    """

    kind: Literal["lookup", "multivalue", "tracking"]
    density: float
    statements: int
    statement_tokens: int
    prompt_tokens: int
    answer_tokens: int

    @property
    def group_tokens(self) -> int:
        """Tokens of all statements that one question asks for."""
        return self.statements * self.statement_tokens

    @property
    def question_tokens(self) -> int:
        """Tokens of one question with its answer."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def max_groups(self) -> int:
        """Groups for which there are enough different words."""
        return len(WORDS) // self.statements


TASKS = {
    "single": Task("lookup", 0.0, 1, 7, 4, 6),
    "multikey": Task("lookup", 1.0, 1, 7, 4, 6),
    "multivalue": Task("multivalue", 0.5, GROUP, 5, 4, 5 * GROUP - 1),
    "tracking": Task("tracking", 0.5, GROUP, 4, 3, 2 * GROUP + 1),
}


@dataclass(frozen=True)
class Sample:
    """One question: the model must continue `prompt_token_ids` with `answer_token_ids`."""

    task: str
    prompt_token_ids: list[int]
    answer_token_ids: list[int]


@dataclass(frozen=True)
class Row:
    """A haystack with one or more answered questions, arrays of shape `[length]`.

    `is_answer` marks the tokens to predict. `ordinal` is, at each `=` of a `multivalue` statement
    or answer, which of its key's values follows (0 .. 3), and -1 elsewhere.
    """

    tokens: np.ndarray
    is_answer: np.ndarray
    ordinal: np.ndarray


def make_sample(task: str, length: int, seed: int, split: Split = "eval") -> Sample:
    """The sample of `task` with this seed; prompt and answer have exactly `length` tokens together.

    The same arguments give the same sample. The two splits draw from different random streams:
    no seed of one is a seed of the other.

    Raises:
        ValueError: the length has no room for the task's statements and question.
    """
    rng = np.random.default_rng([_SPLITS[split], list(TASKS).index(task), length, seed])
    row = make_row(TASKS[task], length, rng, TASKS[task].density, questions=1)
    cut = length - TASKS[task].answer_tokens
    return Sample(task, row.tokens[:cut].tolist(), row.tokens[cut:].tolist())


def make_row(
    task: Task, length: int, rng: np.random.Generator, density: float, questions: int
) -> Row:
    """A row of `length` tokens that ends with `questions` different answered questions.

    At least `questions` groups are hidden, and as many as fill `density` of the haystack.
    """
    room = length - 1 - questions * task.question_tokens
    groups = max(questions, int(density * room) // task.group_tokens)
    groups = min(groups, task.max_groups)
    if room < groups * task.group_tokens or groups < questions:
        raise ValueError(f"{length} tokens have no room for {questions} {task.kind} question(s)")

    statements, asked, guarded = _MAKERS[task.kind](rng, groups, questions)
    haystack, ordinal = _hide(rng, statements, room, guarded)
    answered = np.zeros(asked.shape, dtype=bool)
    answered[:, task.prompt_tokens :] = True
    asked_ordinal = np.where(asked == EQUALS, (asked == EQUALS).cumsum(axis=1) - 1, -1)
    if task.kind != "multivalue":
        ordinal[:] = -1
        asked_ordinal[:] = -1
    return Row(
        tokens=np.concatenate([[BOS], haystack, asked.ravel()]),
        is_answer=np.concatenate([np.zeros(1 + room, dtype=bool), answered.ravel()]),
        ordinal=np.concatenate([[-1], ordinal, asked_ordinal.ravel()]),
    )


_Made = tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]


def _lookup(rng: np.random.Generator, groups: int, questions: int) -> _Made:
    """Statements `[groups, 1, 7]`, questions `[questions, 10]`, guarded words of `lookup`."""
    keys = rng.permutation(WORDS)[:groups]
    values = WORDS[rng.integers(len(WORDS), size=(groups, 4))]
    values[:, 0] = rng.permutation(WORDS)[:groups]
    statements = _columns(groups, keys, EQUALS, values, STOP)
    asked = rng.permutation(groups)[:questions]
    lines = _columns(questions, WHAT, IS, keys[asked], EQUALS, values[asked], STOP, EOS)
    return statements[:, None], lines, (keys, values[:, 0])


def _multivalue(rng: np.random.Generator, groups: int, questions: int) -> _Made:
    """Statements `[groups, 4, 5]`, questions `[questions, 23]`, guarded words of `multivalue`."""
    keys = rng.permutation(WORDS)[:groups]
    values = WORDS[rng.integers(len(WORDS), size=(groups, GROUP, 2))]
    values[:, :, 0] = rng.permutation(WORDS)[: groups * GROUP].reshape(groups, GROUP)
    flat = _columns(groups * GROUP, keys.repeat(GROUP), EQUALS, values.reshape(-1, 2), STOP)
    statements = flat.reshape(groups, GROUP, -1)
    asked = rng.permutation(groups)[:questions]
    lines = _columns(questions, LIST, ALL, statements[asked].reshape(questions, -1), EOS)
    return statements, lines, (keys, values[:, :, 0])


def _tracking(rng: np.random.Generator, groups: int, questions: int) -> _Made:
    """Statements `[groups, 4, 4]`, questions `[questions, 12]`, guarded words of `tracking`."""
    names = rng.permutation(WORDS)[: groups * GROUP].reshape(groups, GROUP)
    chain = np.concatenate([rng.choice(NUMBERS, size=(groups, 1)), names], axis=1)
    flat = _columns(groups * GROUP, names.ravel(), EQUALS, chain[:, :-1].ravel(), STOP)
    back = chain[rng.permutation(groups)[:questions], ::-1]
    linked = np.full((questions, 2 * GROUP + 1), EQUALS)
    linked[:, ::2] = back
    lines = _columns(questions, TRACE, linked, STOP, EOS)
    return flat.reshape(groups, GROUP, -1), lines, (names,)


_MAKERS = {"lookup": _lookup, "multivalue": _multivalue, "tracking": _tracking}


def _columns(rows: int, *parts: int | np.ndarray) -> np.ndarray:
    """Join scalars, `[rows]` and `[rows, n]` arrays side by side into one 2-D array."""
    parts = [part if np.ndim(part) == 2 else np.reshape(part, (-1, 1)) for part in parts]
    columns = [np.broadcast_to(part, (rows, part.shape[1])) for part in parts]
    return np.concatenate(columns, axis=1)


def _hide(
    rng: np.random.Generator, statements: np.ndarray, room: int, guarded: tuple[np.ndarray, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Scatter `statements` `[groups, n, tokens]` over `room` tokens of filler, groups in order.

    Returns the haystack `[room]` and, at each statement's second token, its number in its group.
    """
    groups, per_group, width = statements.shape
    slots = np.sort(rng.permutation(groups * per_group).reshape(groups, per_group), axis=1)
    gaps = np.sort(rng.integers(room - statements.size + 1, size=groups * per_group))
    starts = (gaps + width * np.arange(groups * per_group))[slots]
    places = starts[:, :, None] + np.arange(width)

    haystack = _filler(rng, room)
    is_filler = np.ones(room, dtype=bool)
    haystack[places] = statements
    is_filler[places] = False
    haystack[is_filler & (haystack == EQUALS) & _beside(haystack, guarded)] = COMMA

    ordinal = np.full(room, -1)
    ordinal[places[:, :, 1]] = np.arange(per_group)
    return haystack, ordinal


def _filler(rng: np.random.Generator, room: int) -> np.ndarray:
    """Random words with the numbers and punctuation of `_FILLER` among them, `[room]`."""
    filler = WORDS[rng.integers(len(WORDS), size=room)]
    draw, low = rng.random(room), 0.0
    for share, token in _FILLER:
        chosen = (low <= draw) & (draw < low + share)
        filler[chosen] = rng.choice(NUMBERS, size=chosen.sum()) if token is None else token
        low += share
    return filler


def _beside(tokens: np.ndarray, words: tuple[np.ndarray, ...]) -> np.ndarray:
    """Where a neighbour of `tokens` `[n]` is one of `words`, bool `[n]`."""
    sought = np.zeros(VOCAB_SIZE, dtype=bool)
    for ids in words:
        sought[ids] = True
    found = sought[tokens]
    beside = np.zeros(len(tokens), dtype=bool)
    beside[1:] |= found[:-1]
    beside[:-1] |= found[1:]
    return beside
