"""Lets vLLM's int4 cache read long prompts in less time, so that a study of it ends.

vLLM's kernel for `int4_per_token_head` takes 16 rows of queries a program. With 6 query heads for a
KV head these are two queries, and each two unpack all tokens before them again: 50 prompts of 32K
take minutes. With more rows, what is stored and how it is summed up stay the same.
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
    """Have engines that this process makes from now on use so many rows."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.v1.attention.ops import int4_per_token_head as int4

    int4._attn_packed = WithRows(int4._attn_packed, rows)
