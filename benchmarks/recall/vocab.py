"""The vocabulary of the recall model: a few real words, numbers and made-up words."""

import numpy as np

VOCAB_SIZE = 4096
PAD, BOS, EOS, STOP, COMMA, EQUALS, WHAT, IS, LIST, ALL, TRACE = range(11)
FIXED = ("<pad>", "<s>", "</s>", ".", ",", "=", "what", "is", "list", "all", "trace")

NUMBERS = np.arange(len(FIXED), len(FIXED) + 900)
"""Ids of the numbers "100" .. "999"."""

WORDS = np.arange(NUMBERS[-1] + 1, VOCAB_SIZE)
"""Ids of the made-up words."""

_SYLLABLES = [consonant + vowel for consonant in "bdfjlmnrstvw" for vowel in "aeiou"]


def tokens() -> list[str]:
    """All `VOCAB_SIZE` token strings, in the order of their ids."""
    pairs = [first + second for first in _SYLLABLES for second in _SYLLABLES if first != second]
    chosen = np.random.default_rng(0).permutation(pairs)[: len(WORDS)]
    return [*FIXED, *map(str, range(100, 1000)), *map(str, chosen)]
