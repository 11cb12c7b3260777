"""What is compared within the time that there is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.offline.needles import least_tokens
from vllm_leank.offline.verify.haystacks import QUESTIONS
from vllm_leank.offline.verify.pace import Pace
from vllm_leank.offline.verify.verdict import LEAST_ANSWERS

COMPARED = 64
"""Tokens of a text that are compared at each length."""

SHORT = 1024
"""The short length, where a window is not so large that it leaves few far tokens of it."""

TRIES = 1.5
"""Needles are asked so many times as often as they should be answered right."""

LEAST_TEXTS = 6
"""Texts that are compared at least, if so many are asked for, however slow the machine is."""

LAYERS_SHARE = 0.15
"""Of the time, for looking at layers one by one, if that is done on more than one text."""


@dataclass(frozen=True)
class Work:
    """What is to be compared, apart from lengths.

    Attributes:
        texts: built-in texts.
        kinds: their kinds.
        needles: right answers that needles should give.
        data: lengths of a user's prompts with what follows them.
    """

    texts: int
    kinds: int
    needles: int
    data: Sequence[int]


@dataclass(frozen=True)
class Plan:
    """Lengths at which texts are compared, ascending, how many texts, and how many of them layer by
    layer; and what is compared else.

    `texts`, `data` and `needles` are the seconds that these will take, as far as can be known.
    """

    lengths: tuple[int, ...]
    work: Work
    layer_texts: int
    texts: float
    data: float
    needles: float

    @property
    def longest(self) -> int:
        """The longest length."""
        return self.lengths[-1]

    @property
    def seconds(self) -> float:
        """What all takes."""
        return self.texts + self.data + self.needles


def least_longest(window: Window) -> int:
    """The shortest samples that have far tokens for all that is compared of them."""
    return least_tokens(window) + COMPARED


def doublings(window: Window, longest: int) -> tuple[int, ...]:
    """The short length, its doublings, and `longest`: lengths at which texts are compared."""
    # At least as many far tokens as others.
    length = max(SHORT, 2 ** math.ceil(math.log2(2 * (window.sink + window.recent))))
    lengths = []
    while length < longest:
        lengths.append(length)
        length *= 2
    return (*lengths, longest)


def choose_plan(
    pace: Pace, window: Window, work: Work, candidates: Sequence[int], seconds: float
) -> Plan:
    """The plan with the first of `candidates`, longest lengths, that fits into the time.

    Before that is the last of them, and where none does, there are fewer texts and needles.

    Raises:
        UserError: that does not fit either.
    """
    less = replace(
        work, texts=min(work.texts, LEAST_TEXTS), needles=min(work.needles, LEAST_ANSWERS)
    )
    attempts = [*((longest, work) for longest in candidates), (candidates[-1], less)]
    if len(candidates) > 1:
        # Two lengths tell more than many texts at one.
        attempts.insert(-2, (candidates[-2], less))
    for longest, what in attempts:
        plan = _plan(pace, doublings(window, longest), what, seconds)
        if plan.seconds <= seconds:
            return plan
    minutes = math.ceil(1.2 * plan.seconds / 60)
    raise UserError(
        f"on this machine it takes about {minutes} minutes with up to {plan.longest:,} tokens; "
        f"give --minutes {minutes}, or a smaller --max-tokens, --needles or "
        f"{'--max-prompts' if work.data else '--texts'}"
    )


def _plan(pace: Pace, lengths: tuple[int, ...], work: Work, seconds: float) -> Plan:
    longest = lengths[-1]
    texts = pace.reading(longest) + sum(pace.comparing(length) for length in lengths)
    data = (min(tokens, longest) for tokens in work.data)
    needles = work.needles * (pace.reading(longest) / QUESTIONS + pace.comparing(longest))
    layers = pace.layers * pace.comparing(longest) / 2
    layer_texts = min(work.kinds, work.texts)
    if layer_texts * layers > LAYERS_SHARE * seconds:
        layer_texts = min(1, layer_texts)
    return Plan(
        lengths,
        work,
        layer_texts,
        work.texts * texts + layer_texts * layers,
        sum(pace.reading(tokens) + pace.comparing(tokens) for tokens in data),
        TRIES * needles,
    )
