"""What a step's kernels read: the requests, their lengths, and where their pages are."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from vllm_leank.kernels.prepared import Prepares

MAX_DECODE_QUERIES = 16
"""Queries after its prompt, at most, that a request may have in a step to be decoded: each as if it
were a request. More of them share what they read (`extend`)."""


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
class Batch(Prepares):
    """The requests of one step, shared by all layers.

    Attributes:
        query_start_loc: `[num_reqs + 1]`, first query row of each request.
        query_start_loc_cpu: the same on the host.
        seq_lens: `[num_reqs]`, tokens computed after this step.
        exact_until: `[num_reqs]`, prompt lengths; 0 where prompts are read pruned.
        window_table: `[num_reqs, max_blocks]`, page of each `window_block` tokens. Entries of freed
            blocks are stale: only the window rule says which may be read.
        archive_table: `[num_reqs, max_blocks]`, page of each `archive_block` tokens.
        slots: `[num_tokens]`, where each new token goes: window page * `window_block` + offset, -1
            for padding.
        in_prompt: `[num_reqs]` or shorter, bool, on the host: whether some of the queries may be
            below `exact_until`. Decides how they are computed, not what they read.
        max_query_len: most queries of a request.
        max_seq_len: largest of `seq_lens`, or more.

    All are int32 tensors (slots int64), but for the last three.
    """

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    exact_until: torch.Tensor
    window_table: torch.Tensor
    archive_table: torch.Tensor
    slots: torch.Tensor
    in_prompt: torch.Tensor
    max_query_len: int
    max_seq_len: int

    @cached_property
    def num_reqs(self) -> int:
        """Requests, padding included."""
        return len(self.query_start_loc_cpu) - 1

    @cached_property
    def table_strides(self) -> tuple[int, int]:
        """Entries from one request to the next in the window's and in the archive's table."""
        return self.window_table.stride(0), self.archive_table.stride(0)

    @cached_property
    def num_decodes(self) -> int:
        """Requests at the beginning that are decoded: with one query at most, or with a few after
        the prompt, as speculative decoding has them.
        """
        if self.max_query_len <= 1:
            return self.num_reqs
        queries = self.query_start_loc_cpu.diff()
        others = queries > MAX_DECODE_QUERIES
        others[: len(self.in_prompt)] |= self.in_prompt & (queries[: len(self.in_prompt)] > 1)
        return int(others.int().argmax()) if others.any() else self.num_reqs

    @property
    def decodes(self) -> "Batch":
        """The queries of the requests that are decoded, as requests of one query each."""
        # Not kept by itself: what it prepared must go when the step is over, and not when Python
        # next looks for circles, which it does not do while graphs are captured.
        return self if self.max_query_len <= 1 else self._decoded_queries

    @cached_property
    def _decoded_queries(self) -> "Batch":
        part = self.part(0, self.num_decodes, self.max_query_len)
        if not (part.query_start_loc_cpu.diff() > 1).any():
            return replace(part, max_query_len=1)
        return part.per_query

    @cached_property
    def extends(self) -> "Batch":
        """The other requests."""
        return self.part(self.num_decodes, self.num_reqs, self.max_query_len)

    @cached_property
    def replayed(self) -> bool:
        """Whether some of the queries come after their prompts, as those of answers do that are
        computed again. Waits for the device.
        """
        return bool((self.seq_lens > self.exact_until).any())

    @cached_property
    def per_query(self) -> "Batch":
        """Each query as a request that ends with it; the device is not waited for."""
        return self.queries(0, int(self.query_start_loc_cpu[-1] - self.query_start_loc_cpu[0]))

    def queries(self, first: int, last: int) -> "Batch":
        """The same of queries `first` to `last`, counted from this part's first. A row of the block
        tables is as long as the longest request may be, and each query has its own.
        """
        start = self.local_query_start_loc
        index = torch.arange(first, last, dtype=start.dtype, device=start.device)
        row = torch.searchsorted(start, index, right=True) - 1
        count = last - first
        return replace(
            self,
            query_start_loc=torch.arange(count + 1, dtype=start.dtype, device=start.device),
            query_start_loc_cpu=torch.arange(count + 1, dtype=self.query_start_loc_cpu.dtype),
            # Before the tables: `select.py` reads these before it waits for the launch before it.
            seq_lens=self.seq_lens[row] - (start[row + 1] - 1 - index),
            exact_until=self.exact_until[row],
            window_table=self.window_table[row],
            archive_table=self.archive_table[row],
            in_prompt=self.in_prompt[:0],
            max_query_len=1,
        )

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

    def part(self, first: int, last: int, max_query_len: int) -> "Batch":
        """Requests `first` to `last`, none of more than `max_query_len` queries."""
        return replace(
            self,
            query_start_loc=self.query_start_loc[first : last + 1],
            query_start_loc_cpu=self.query_start_loc_cpu[first : last + 1],
            seq_lens=self.seq_lens[first:last],
            exact_until=self.exact_until[first:last],
            window_table=self.window_table[first:last],
            archive_table=self.archive_table[first:last],
            in_prompt=self.in_prompt[first:last],
            max_query_len=max_query_len,
        )
