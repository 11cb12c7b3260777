"""The two tasks that masks are learned and verified on, as text: dense retrieval and multi-value.

Both ask for something that stands once in a long context, so answers depend on far keys. A task is
a function of a random generator and a size; the same generator state and size give the same text.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

NOISE = (
    "Rain fell on the roof. ",
    "A cart went by. ",
    "The lamp was lit again. ",
    "Someone swept the yard. ",
    "It grew late. ",
)
"""Filler for `multivalue` where no essay is given, repeated."""

PLACES = (
    "Lima",
    "Oslo",
    "Quito",
    "Turin",
    "Izmir",
    "Kyoto",
    "Perth",
    "Dakar",
    "Tampa",
    "Bergen",
    "Paris",
    "Boston",
    "Cairo",
    "Delhi",
    "Rome",
    "Berlin",
    "Madrid",
    "Lisbon",
    "Vienna",
    "Athens",
    "Dublin",
    "Prague",
    "Moscow",
    "Tokyo",
)
"""Names that most tokenizers have few tokens for."""


class Exercise(NamedTuple):
    """A prompt and the answer that continues it."""

    prompt: str
    answer: str


Task = Callable[[np.random.Generator, int], Exercise]


def retrieval(rng: np.random.Generator, size: int) -> Exercise:
    """`size` lines `uuid: uuid`, of which one is asked for."""
    pairs = uuid_pairs(rng, size)
    key, value = pairs[rng.integers(size)]
    lines = "".join(f"{left}: {right}\n" for left, right in pairs)
    return Exercise(f"Keys and their values:\n\n{lines}\nThe value of {key} is", f" {value}")


def multivalue(
    rng: np.random.Generator, size: int, filler: Sequence[str] = NOISE, values: int = 4
) -> Exercise:
    """`size` pieces of filler, among them `values` numbers of one key, all asked for in order.

    The filler is read from a random piece on, and from its start again at its end.
    """
    key = "".join(rng.choice(list("bdfgklmnprstvz" if i % 2 == 0 else "aeiou")) for i in range(8))
    numbers = rng.choice(9_000_000, size=values, replace=False) + 1_000_000
    places = np.sort(rng.integers(size + 1, size=values))
    start = int(rng.integers(len(filler)))
    pieces = [filler[(start + i) % len(filler)] for i in range(size)]
    for place, number in zip(places[::-1], numbers[::-1], strict=True):
        pieces.insert(place, f"One of the numbers of {key} is {number}. ")
    question = f"\n\nAll numbers of {key}, in the order of the text:"
    return Exercise("".join(pieces).rstrip() + question, " " + ", ".join(map(str, numbers)) + ".")


def essay_pieces(text: str) -> list[str]:
    """A text as filler: sentences, cut where they are longer than 400 characters."""
    return [piece + " " for piece in re.findall(r"[^.!?]{1,400}[.!?]*", " ".join(text.split()))]


def uuid_pairs(rng: np.random.Generator, size: int) -> list[tuple[str, str]]:
    """`size` pairs of UUIDs, version 4."""
    digits = rng.bytes(32 * size).hex()
    return [
        (_uuid(digits[start : start + 32]), _uuid(digits[start + 32 : start + 64]))
        for start in range(0, 64 * size, 64)
    ]


def _uuid(digits: str) -> str:
    """Of 32 random digits; two of them tell the version and the variant."""
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
