"""What a step's kernels read: the requests, their lengths, and where their pages are."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch


class Row(NamedTuple):
    """One request of a step, in host integers.

    Attributes:
        table_row: its row in the block tables.
        queries: its rows in the query tensor.
        before: tokens computed before this step; the position of its first query.
        after: tokens computed after this step.
        exact_until: queries at positions below read every key dense.
    """

    table_row: int
    queries: slice
    before: int
    after: int
    exact_until: int


@dataclass(frozen=True)
class Batch:
    """The requests of one step, shared by all layers.

    Attributes:
        query_start_loc: `[num_reqs + 1]`, first query row of each request.
        seq_lens: `[num_reqs]`, tokens computed after this step.
        exact_until: `[num_reqs]`, prompt lengths.
        window_table: `[num_reqs, max_blocks]`, page of each 32 tokens. Entries of freed blocks are
            stale: only the window rule says which may be read.
        archive_table: `[num_reqs, max_blocks]`, page of each `archive_block` tokens.
        slots: `[num_tokens]`, where each new token goes: window page * 32 + offset, -1 for padding.

    All are integer tensors.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    exact_until: torch.Tensor
    window_table: torch.Tensor
    archive_table: torch.Tensor
    slots: torch.Tensor

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The requests in host integers; rows without queries (padding) are left out."""
        starts = self.query_start_loc.tolist()
        return tuple(
            Row(row, slice(first, last), after - (last - first), after, exact_until)
            for row, (first, last, after, exact_until) in enumerate(
                zip(
                    starts,
                    starts[1:],
                    self.seq_lens.tolist(),
                    self.exact_until.tolist(),
                    strict=False,  # padded rows at the end may lack a prompt length
                )
            )
            if last > first
        )
