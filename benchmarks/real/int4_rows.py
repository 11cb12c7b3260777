"""vLLM's int4 cache with more queries of a prompt in a program, so that long prompts end.

The kernel that reads `int4_per_token_head` takes 16 rows of queries a program, which of models with
6 query heads for a KV head are 2 queries: each pair of queries unpacks all tokens before it again,
and 50 prompts of 32,256 tokens take minutes. More rows change nothing of what is stored, of the
tiles of tokens, or of the steps that answers take; only who computes a row.
"""

import os
from collections.abc import Callable
from typing import Any

WARP_ROWS = 16
"""Rows for each warp, with which no registers spill on a Hopper GPU."""


class WithRows:
    """Stands in for vLLM's kernel and launches it with more rows where a step has a prompt."""

    def __init__(self, kernel: Any, rows: int) -> None:
        self._kernel = kernel
        self._rows = rows

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            tokens, requests = len(arguments["query_ptr"]), arguments["num_seqs"]
            if tokens == requests:  # each has one query
                self._kernel[grid](**arguments)
                return
            queries = self._rows // arguments["num_queries_per_kv"]
            changed = {"BLOCK_M": self._rows, "BLOCK_Q": queries}
            blocks = tokens // queries + requests, *grid[1:]
            self._kernel[blocks](**(arguments | changed), num_warps=self._rows // WARP_ROWS)

        return launch


def launch_with_rows(rows: int) -> None:
    """From now on, and for engines of this process, of which there are none yet."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.v1.attention.ops import int4_per_token_head as int4

    int4._attn_packed = WithRows(int4._attn_packed, rows)
