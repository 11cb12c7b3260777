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
        query_start_loc_cpu: the same on the host.
        seq_lens: `[num_reqs]`, tokens computed after this step.
        exact_until: `[num_reqs]`, prompt lengths.
        window_table: `[num_reqs, max_blocks]`, page of each 32 tokens. Entries of freed blocks are
            stale: only the window rule says which may be read.
        archive_table: `[num_reqs, max_blocks]`, page of each `archive_block` tokens.
        slots: `[num_tokens]`, where each new token goes: window page * 32 + offset, -1 for padding.
        max_query_len: most queries of a request.
        max_seq_len: largest of `seq_lens`, or more.

    All are int32 tensors (slots int64), but for the last two.
    """

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    exact_until: torch.Tensor
    window_table: torch.Tensor
    archive_table: torch.Tensor
    slots: torch.Tensor
    max_query_len: int
    max_seq_len: int

    @property
    def num_reqs(self) -> int:
        """Requests, padding included."""
        return len(self.query_start_loc_cpu) - 1

    @cached_property
    def num_decodes(self) -> int:
        """Requests at the beginning that have one query at most."""
        if self.max_query_len <= 1:
            return self.num_reqs
        longer = self.query_start_loc_cpu.diff() > 1
        return int(longer.int().argmax())

    @cached_property
    def decodes(self) -> "Batch":
        """The requests at the beginning that have one query at most."""
        return self._part(0, self.num_decodes, 1)

    @cached_property
    def extends(self) -> "Batch":
        """The other requests."""
        return self._part(self.num_decodes, self.num_reqs, self.max_query_len)

    @cached_property
    def local_query_start_loc(self) -> torch.Tensor:
        """`query_start_loc`, counted from this part's first query."""
        return self.query_start_loc - int(self.query_start_loc_cpu[0])

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The requests in host integers; rows without queries (padding) are left out. Waits for
        the device.
        """
        starts = self.query_start_loc_cpu.tolist()
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

    def _part(self, first: int, last: int, max_query_len: int) -> "Batch":
        return Batch(
            query_start_loc=self.query_start_loc[first : last + 1],
            query_start_loc_cpu=self.query_start_loc_cpu[first : last + 1],
            seq_lens=self.seq_lens[first:last],
            exact_until=self.exact_until[first:last],
            window_table=self.window_table[first:last],
            archive_table=self.archive_table[first:last],
            slots=self.slots,
            max_query_len=max_query_len,
            max_seq_len=self.max_seq_len,
        )
