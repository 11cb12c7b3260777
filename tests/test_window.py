"""The window rule against its definition, token by token."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_leank.core.window import GRANULE, Window

LENGTHS = range(4097)
WINDOWS = [Window(*pair) for pair in [(0, 32), (32, 64), (64, 256), (128, 768), (64, 100), (0, 33)]]
every_window = pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"{w.sink}-{w.recent}")


def naive_boundary(length, sink, recent):
    """Move up by 32 tokens for as long as `recent` tokens stay dense."""
    edge = sink
    while length - (edge + 32) >= recent:
        edge += 32
    return edge


def place(window, token, length):
    """Where the last query of a request of `length` tokens reads a token."""
    boundary = window.boundary(length)
    places = [
        name
        for name, tokens in [
            ("sink", range(min(window.sink, length))),
            ("archive", range(window.sink, boundary)),
            ("recent", range(boundary, length)),
        ]
        if token in tokens
    ]
    assert len(places) == 1
    return places[0]


@every_window
def test_boundary_is_the_naive_one_at_every_length(window):
    for length in LENGTHS:
        assert window.boundary(length) == naive_boundary(length, window.sink, window.recent)


@every_window
def test_boundary_moves_up_in_steps_and_keeps_recent_tokens_dense(window):
    boundaries = [window.boundary(length) for length in LENGTHS]
    assert boundaries[0] == window.sink
    assert {after - before for before, after in pairwise(boundaries)} == {
        0,
        GRANULE,
    }
    for length, boundary in enumerate(boundaries):
        if boundary > window.sink:
            assert window.recent <= length - boundary < window.recent + GRANULE


@every_window
def test_a_boundary_says_when_it_moves(window):
    for length, after in pairwise(LENGTHS):
        boundary = window.boundary(length)
        assert (window.boundary(after) > boundary) == (after >= window.moves_at(boundary))


@every_window
@pytest.mark.parametrize("prompt", [0, 40, 1000, 1020])
def test_nothing_more_is_free_before_it_is_said_to_be(window, prompt):
    for processed, after in pairwise(LENGTHS):
        free, more = (window.free_tokens(one, prompt) for one in (processed, after))
        frees_at = window.frees_at(processed, prompt)
        assert frees_at > processed
        assert more == free or after >= frees_at
        if processed >= prompt and after >= frees_at:
            assert more != free


@every_window
def test_every_token_is_in_one_place(window):
    for length in [*range(1, 1200, 7), 1023, 1024, 1025]:
        places = [place(window, token, length) for token in range(length)]
        assert places[: window.sink] == ["sink"] * min(window.sink, length)
        if length > window.sink:
            dense = min(window.recent, length - window.sink)
            assert places[length - dense :] == ["recent"] * dense


@every_window
@pytest.mark.parametrize(
    "wrap",
    [
        lambda lengths: torch.tensor(lengths),
        lambda lengths: torch.tensor(lengths, dtype=torch.int32)[:, None],
        lambda lengths: np.array(lengths),
        lambda lengths: np.array(lengths, dtype=np.int32),
    ],
    ids=["tensor", "int32 tensor", "array", "int32 array"],
)
def test_boundary_of_many_lengths_is_that_of_each(window, wrap):
    lengths = wrap(list(LENGTHS))
    boundaries = window.boundary(lengths)
    assert boundaries.dtype == lengths.dtype
    assert boundaries.shape == lengths.shape
    assert boundaries.flatten().tolist() == [window.boundary(length) for length in LENGTHS]


@every_window
def test_archive_slots_are_token_positions(window):
    for length in LENGTHS:
        boundary = window.boundary(length)
        assert window.archived(length) == (0 if boundary == window.sink else boundary)


@st.composite
def runs(draw):
    """A window, a prompt length and the token counts after each step; step 0 is a prefix hit."""
    window = draw(st.sampled_from(WINDOWS))
    prompt = draw(st.integers(1, 1500))
    length = prompt + draw(st.integers(0, 700))
    hit = draw(st.integers(0, (prompt - 1) // 32)) * 32
    cuts = draw(st.lists(st.integers(hit + 1, length), max_size=40))
    one_by_one = range(prompt, length) if draw(st.booleans()) else ()
    return window, prompt, [hit, *sorted({*cuts, *one_by_one, length})]


@settings(max_examples=300, deadline=None)
@given(runs())
def test_steps_archive_every_token_once_and_before_it_is_read_there(run):
    window, prompt, lengths = run
    archived_to = window.sink
    for before, after in pairwise(lengths):
        moved = window.compaction(before, after, prompt)
        if moved:
            assert moved.start == archived_to
            assert moved.step == GRANULE
            archived_to = moved[-1] + GRANULE
            assert archived_to <= window.archived(after)
        for position in range(max(before, prompt), after):
            assert naive_boundary(position + 1, window.sink, window.recent) <= archived_to
        if after >= prompt:
            assert archived_to == naive_boundary(after, window.sink, window.recent)


@settings(max_examples=300, deadline=None)
@given(runs())
def test_nothing_freed_is_read_or_archived_later(run):
    window, prompt, lengths = run
    freed = set()
    for before, after in pairwise(lengths):
        pages = window.free_tokens(before, prompt)
        freed |= {token for page in pages for token in range(page, page + GRANULE)}
        assert all(page % GRANULE == 0 for page in pages)
        if before < prompt:
            assert not freed
        assert freed.isdisjoint(range(window.sink))
        for page in window.compaction(before, after, prompt):
            assert freed.isdisjoint(range(page, page + GRANULE))
        first = naive_boundary(before + 1, window.sink, window.recent)
        assert freed.isdisjoint(range(first, after))


@every_window
def test_all_that_is_archived_is_freed_once_the_prompt_is_done(window):
    for length in LENGTHS:
        moved = window.compaction(0, length, length)
        assert window.free_tokens(length, length) == moved
        assert not window.free_tokens(length, length + 1)
        assert not window.compaction(0, length, length + 1)


@pytest.mark.parametrize(
    ("sink", "recent", "message"),
    [
        (-32, 64, "sink is -32, but must be 0 or a multiple of 32"),
        (30, 64, "sink is 30, but must be 0 or a multiple of 32"),
        (16, 64, "sink is 16, but must be 0 or a multiple of 32"),
        (64, 31, "recent is 31, but must be at least 32"),
        (64, 0, "recent is 0, but must be at least 32"),
        (64, -64, "recent is -64, but must be at least 32"),
    ],
)
def test_values_out_of_range_are_refused(sink, recent, message):
    with pytest.raises(ValueError, match=message):
        Window(sink, recent)


@every_window
@pytest.mark.parametrize("block", [32, 64, 96, 160, 256])
def test_a_prefix_is_the_longest_of_whole_pages(window, block):
    """Of window pages, and of archive pages as far as it has any."""
    best = 0
    for limit in LENGTHS:
        if limit % GRANULE == 0 and window.archived(limit) % block == 0:
            best = limit
        assert window.prefix(limit, block) == best


@every_window
@pytest.mark.parametrize("chunk", [1, 50, 512])
def test_no_prompt_holds_more_dense_tokens_than_said(window, chunk):
    """However it is cut, what is computed at once, and what is freed only after the next step."""
    pruned = replace(window, exact=False)
    for processed in range(0, 4096 - 2 * chunk, 7):
        length = processed + 2 * chunk
        freed = len(pruned.free_tokens(processed, pruned.exact_until(length))) * GRANULE
        assert length - freed <= pruned.most_dense(length, 2 * chunk)
        assert window.most_dense(length, 2 * chunk) == length


def test_where_prompts_are_read_exactly_or_pruned():
    assert Window(32, 64).exact_until(100) == 100
    assert Window(32, 64, exact=False).exact_until(100) == 0
