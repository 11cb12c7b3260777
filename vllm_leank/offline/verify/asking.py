"""Answers by which a mask is judged: those that dense attention gets right.

A mask can only lose what the model knows. So models are asked until they have known enough: each
kind of question about contexts as long as may be, about shorter ones where few answers are right,
and no more where the model does not know even those.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from vllm_leank.offline.verify.comparison import Comparison, right_answers
from vllm_leank.offline.verify.haystacks import Haystack
from vllm_leank.offline.verify.reader import Reader

MASTERED = 0.5
"""Share of right answers below which contexts become shorter."""

UNKNOWN = 0.25
"""Share of right answers below which a kind is given up when contexts cannot become shorter."""

Ask = Callable[[str, int], Sequence[Comparison]]
"""Asks all questions of a new context, given its kind and its tokens."""


def ask_until(
    ask: Ask,
    kinds: Iterable[str],
    *,
    wanted: int,
    longest: int,
    shortest: int,
    has_time: Callable[[int], bool],
) -> Iterator[Comparison]:
    """Ask the kinds in turn until dense attention had `wanted` answers right, or knows none of the
    kinds, or no context of `shortest` tokens fits into the time any more.

    `has_time` tells whether a context of so many tokens does.
    """
    lengths = dict.fromkeys(kinds, longest)
    right = 0
    while lengths:
        for kind in list(lengths):
            while lengths[kind] > shortest and not has_time(lengths[kind]):
                lengths[kind] = max(shortest, lengths[kind] // 2)
            if right >= wanted or not has_time(lengths[kind]):
                return
            found = ask(kind, lengths[kind])
            yield from found
            known = sum(bool(one.dense_right) for one in found)
            right += known
            if known < MASTERED * len(found) and lengths[kind] > shortest:
                lengths[kind] = max(shortest, lengths[kind] // 2)
            elif known < UNKNOWN * len(found):
                del lengths[kind]


def ask_haystack(reader: Reader, haystack: Haystack, unit: int) -> Iterator[Comparison]:
    """The answers to all questions of a context, which is read once."""
    room = max(len(one.question) + len(one.answer) for one in haystack.questions)
    reader.begin(len(haystack.context) + room)
    reader.read(haystack.context)
    end = reader.mark()
    for question, answer in haystack.questions:
        firsts = reader.read(question)
        found = reader.compare(answer)
        yield Comparison.of(
            haystack.kind,
            unit,
            haystack.context + question,
            answer,
            found,
            right_answers(answer, firsts, found),
        )
        reader.cut(end)
