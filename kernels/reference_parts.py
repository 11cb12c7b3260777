"""Which queries of a step the reference attends at once, and which tokens they read.

Found once per step, for all layers. Requests with few queries share what they read from where: one
after the other, they would take a hundred small operations each in every layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from vllm_leank.kernels.batch import MAX_DECODE_QUERIES, Batch, Row

from vllm_leank.core.window import GRANULE, Window

MAX_TOKENS = 1 << 16
"""Archived tokens of several requests that are read at once: 32 MiB of K, of 128 channels."""

SHORT = 256
"""Archived tokens that cost less to read than a further operation for each of them."""


@dataclass(frozen=True)
class DensePart:
    """Queries of a request that read every key dense.

    Attributes:
        table_row: the request's row in the block tables.
        first: row of the first query in the query tensor.
        start: position of the first query.
        end: position behind the last.
    """

    table_row: int
    first: int
    start: int
    end: int


@dataclass(frozen=True)
class PrunedPart:
    """Queries of B requests, Q of each, by the second rule of the window. Requests with fewer
    repeat their last query, and the last token that they read, which is hidden then.

    Attributes:
        queries: `[B, Q]`, rows in the query tensor.
        window_pages: `[B, tokens]`, where tokens lie that are read dense: pages,
        slots: `[B, tokens]`, and places in them.
        hidden_dense: bool `[B, 1, Q, tokens]`, which of these a query does not see; None: it sees
            them all.
        archive_pages: `[B * granules]`, where runs of 32 archived tokens lie: pages, None if there
            are none,
        granules: `[B * granules]`, and runs in them.
        hidden_archived: bool `[B, Q, archived tokens]`; as `hidden_dense`.
    """

    queries: torch.Tensor
    window_pages: torch.Tensor
    slots: torch.Tensor
    hidden_dense: torch.Tensor | None
    archive_pages: torch.Tensor | None
    granules: torch.Tensor
    hidden_archived: torch.Tensor | None


def parts_of(
    batch: Batch, window: Window, window_block: int, archive_block: int, max_scores: int
) -> tuple[list[DensePart], list[PrunedPart]]:
    """All queries of a step.

    Args:
        batch: the step's requests.
        window: the rule.
        window_block: tokens of a window page.
        archive_block: tokens of an archive page.
        max_scores: scores of a query head that are held at once, at most, where one query has not
            more of them.
    """
    dense: list[DensePart] = []
    pruned: list[Row] = []
    for row in batch.rows:
        exact = min(max(row.exact_until, row.before), row.after)
        for start, end in _chunks(row.before, exact, row.after, max_scores):
            first = row.queries.start + start - row.before
            dense.append(DensePart(row.table_row, first, start, end))
        for start, end in _chunks(exact, row.after, row.after, max_scores):
            queries = slice(
                row.queries.start + start - row.before, row.queries.start + end - row.before
            )
            pruned.append(Row(row.table_row, queries, start, end, row.exact_until))
    groups = _groups(pruned, window)
    return dense, [
        _pruned_part(batch, window, window_block, archive_block, rows) for rows in groups
    ]


def _chunks(start: int, end: int, tokens: int, max_scores: int) -> Iterator[tuple[int, int]]:
    """Queries from `start` to `end` of a request, as many at once as their scores allow."""
    at_once = max(max_scores // tokens, 1)
    for first in range(start, end, at_once):
        yield first, min(first + at_once, end)


def _groups(rows: list[Row], window: Window) -> list[list[Row]]:
    """Rows that are read together: they have few queries, and archives of like lengths."""
    few = [row for row in rows if _queries(row) <= MAX_DECODE_QUERIES]
    groups: list[list[Row]] = []
    longest = 0
    for row in sorted(few, key=lambda row: window.archived(row.after), reverse=True):
        archived = window.archived(row.after)
        if (
            groups
            and bool(archived) == bool(longest)
            and longest <= max(2 * archived, SHORT)
            and longest * (len(groups[-1]) + 1) <= MAX_TOKENS
        ):
            groups[-1].append(row)
        else:
            groups.append([row])
            longest = archived
    return groups + [[row] for row in rows if _queries(row) > MAX_DECODE_QUERIES]


def _queries(row: Row) -> int:
    return row.after - row.before


def _pruned_part(
    batch: Batch, window: Window, window_block: int, archive_block: int, rows: list[Row]
) -> PrunedPart:
    device, sink = batch.window_table.device, window.sink
    numbers = [(row.table_row, row.queries.start, row.before, row.after) for row in rows]
    # [B, 1] each
    table_row, first, start, end = torch.tensor(numbers, device=device).T[..., None]
    queries = torch.arange(max(map(_queries, rows)), device=device).minimum(end - start - 1)
    position = start + queries  # [B, Q]
    boundary = window.boundary(position + 1)[..., None]

    # The sink, and what is dense for the first query or a later one. Tokens between the first and
    # the last query's boundary are dense for some and archived for others: they are read from both
    # places, each under its own mask.
    count = max(row.after - window.boundary(row.before + 1) for row in rows)
    # A sink may be longer than all requests.
    read = min(sink, max(row.after for row in rows))
    token = torch.arange(read + max(count, 0), device=device)
    # [B, tokens]
    token = torch.where(token < sink, token, token - sink + window.boundary(start + 1))
    seen = token[:, None]
    seen = (seen <= position[..., None]) & ((seen < sink) | (seen >= boundary))
    token = token.minimum(end - 1)
    window_pages = batch.window_table[table_row, token // window_block].long()

    archived = torch.arange(sink, max(window.boundary(row.after) for row in rows), device=device)
    seen_archived = archived < boundary  # [B, Q, archived tokens]
    # The first token of each run of 32
    run = archived[::GRANULE].minimum(window.boundary(end) - GRANULE)
    archive_pages = batch.archive_table[table_row, run // archive_block].long().flatten()
    return PrunedPart(
        first + queries,
        window_pages,
        token % window_block,
        _hidden(seen[:, None]),
        archive_pages if len(archived) else None,
        (run % archive_block // GRANULE).flatten(),
        _hidden(seen_archived),
    )


def _hidden(seen: torch.Tensor) -> torch.Tensor | None:
    return None if seen.all() else ~seen
