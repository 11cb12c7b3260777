"""The window rule: which tokens of a request are dense, and from when on.

A request of length L keeps its first `sink` tokens and at least its last `recent` tokens dense,
in *window* pages; the tokens between are pruned, in *archive* pages:

    0 .. sink               dense    window pages
    sink .. boundary(L)     pruned   archive pages
    boundary(L) .. L        dense    window pages

What a query reads is decided by its position alone:

* position t < `exact_until`: every key 0..t, dense ("exact prefill");
* any other position t: keys [0, sink) and [boundary(t + 1), t] dense, and [sink, boundary(t + 1))
  from the archive.

`exact_until` is the prompt's length, or, where prompts too are read pruned, 0. So an answer depends
on the tokens, the prompt's length and the mask, and not on chunk sizes, batch mates, preemption or
which blocks happen to be cached. Nothing else in the project computes a boundary.
"""

from dataclasses import dataclass
from typing import Any

from vllm_leank.errors import shortened

MOST = 1 << 28
"""Tokens of sink or recent, at most: kernels count tokens in 32 bits."""

GRANULE = 32
"""Tokens by which the boundary moves, and which are compacted into the archive at once. A window
page has as many, or a multiple (`CachePlan.window_block`)."""


def check_sink(sink: int) -> int:
    """The number itself, if it can be a window's `sink`.

    Raises:
        ValueError: it cannot; the message says what is allowed.
    """
    if sink < 0 or sink % GRANULE:
        raise ValueError(
            f"sink is {shortened(sink)}, but must be 0 or a multiple of {GRANULE}: "
            f"the archive takes tokens in steps of {GRANULE}"
        )
    return _check_most("sink", sink)


def check_recent(recent: int) -> int:
    """The number itself, if it can be a window's `recent`; see `check_sink`."""
    if recent < GRANULE:
        raise ValueError(
            f"recent is {shortened(recent)}, but must be at least {GRANULE}: "
            f"the archive takes tokens in steps of {GRANULE}"
        )
    return _check_most("recent", recent)


def _check_most(name: str, tokens: int) -> int:
    if tokens > MOST:
        raise ValueError(f"{name} is {shortened(tokens)}, but must be at most {MOST}")
    return tokens


def whole_granules(sink: int) -> int:
    """The sink of a mask, which may have been made for any number of tokens, rounded up to whole
    granules: more tokens stay dense than it was made for, never fewer.
    """
    return -(-sink // GRANULE) * GRANULE


@dataclass(frozen=True)
class Window:
    """The dense window of every request.

    Attributes:
        sink: first tokens that stay dense; a multiple of 32.
        recent: least number of last tokens that stay dense; at least 32.
        exact: whether prompts are read with full attention, or as answers are.

    Raises:
        ValueError: if a value is out of range; the message names it and what is allowed.
    """

    sink: int
    recent: int
    exact: bool = True

    def __post_init__(self) -> None:
        check_sink(self.sink)
        check_recent(self.recent)

    def boundary(self, length: Any) -> Any:
        """First token after the pruned range of a request that is `length` tokens long.

        Takes and returns an int, or an integer array or tensor of any shape.
        """
        excess = length - (self.sink + self.recent)
        return self.sink + excess // GRANULE * GRANULE * (excess > 0)

    def moves_at(self, boundary: int) -> int:
        """Tokens of a request at which its `boundary` moves on."""
        return boundary + self.recent + GRANULE

    def exact_until(self, prompt: int) -> int:
        """Position below which queries read every key dense, for a prompt of `prompt` tokens."""
        return prompt if self.exact else 0

    def archived(self, length: int) -> int:
        """Archive slots that a request of `length` tokens needs (slots are token positions)."""
        boundary = self.boundary(length)
        return boundary if boundary > self.sink else 0

    def prefix(self, limit: int, block: int) -> int:
        """Longest prefix, of `limit` tokens at most, that can be taken up without its dense middle.

        It fills whole window pages of 32 tokens, which is all that pruned prompts have, and its
        archived tokens fill whole pages of `block` tokens.
        """
        longest = limit // GRANULE * GRANULE
        recent = -(-self.recent // GRANULE) * GRANULE
        boundary = (longest - recent) // block * block
        return boundary + recent if boundary > self.sink else min(longest, self.sink + recent)

    def most_dense(self, length: int, in_flight: int) -> int:
        """Tokens that are dense at most while a prompt of `length` tokens is computed, `in_flight`
        tokens at once.
        """
        if self.exact:
            return length
        return min(length, self.moves_at(self.sink) - 1 + in_flight)

    def compaction(self, before: int, after: int, exact_until: int) -> range:
        """Tokens that the step from `before` to `after` computed tokens moves to the archive.

        During exact prefill nobody reads the archive, so nothing is moved until the step that
        completes the prompt. That one moves the whole prompt, wherever it began: a prompt whose
        first tokens came from the prefix cache needs no archive pages from there.
        """
        if after < exact_until:
            return range(0)
        start = self.sink if before < exact_until else self.boundary(before)
        return range(start, self.boundary(after), GRANULE)

    def free_tokens(self, processed: int, exact_until: int) -> range:
        """Tokens that no query after the first `processed` tokens reads, and no compaction."""
        if processed < exact_until:
            return range(0)
        return range(self.sink, self.boundary(processed), GRANULE)

    def frees_at(self, processed: int, exact_until: int) -> int:
        """Processed tokens at which more than those `free_tokens` may be free."""
        if processed < exact_until:
            return exact_until
        return self.moves_at(self.boundary(processed))

    def free_pages(self, processed: int, exact_until: int, block: int) -> range:
        """Window pages of `block` tokens that hold none but `free_tokens`, by their numbers."""
        free = self.free_tokens(processed, exact_until)
        first = -(-free.start // block)
        return range(first, max(free.stop // block, first))
