"""What the kernels share: the window rule on the device, and how they take a step's requests."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
"""Kernels compute exponentials of base 2: scores are in units of log2."""

BATCH_POINTERS = [
    "slots_ptr", "window_table_ptr", "archive_table_ptr", "query_start_ptr", "seq_lens_ptr",
    "exact_until_ptr",
]  # fmt: skip
"""Parameters of kernels that are tensors of a `Batch`. They begin anywhere, as a part of a batch
does: their addresses must not choose another compilation."""


@triton.jit
def boundary_of(length, SINK: tl.constexpr, RECENT: tl.constexpr):
    """`Window.boundary`, the first token after the pruned range."""
    excess = tl.maximum(length - (SINK + RECENT), 0)
    return SINK + excess // 32 * 32


@triton.jit
def dense_granules(length, boundary, SINK: tl.constexpr):
    """Dense granules of a request of `length` tokens, of which those from `SINK` to `boundary` are
    pruned.
    """
    return tl.cdiv(length - (boundary - SINK), 32)


@triton.jit
def skip_archived(granule, boundary, SINK: tl.constexpr):
    """Which granule of its request dense granule `granule` is, that is counted without the pruned
    range.
    """
    return tl.where(granule < SINK // 32, granule, granule + (boundary - SINK) // 32)


@triton.jit
def load_sink_scores(sink_scores_ptr, head, m_head):
    """The attention sinks of query heads, fp32, in units of log2; `-inf` of heads that do not
    exist.
    """
    return tl.load(sink_scores_ptr + head, mask=m_head, other=float("-inf")).to(tl.float32) * LOG2_E
