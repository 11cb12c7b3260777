"""Device functions that the kernels share: the window rule and the online softmax."""

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)
"""The largest number of fp8 e4m3."""


@triton.jit
def boundary_of(length, SINK: tl.constexpr, RECENT: tl.constexpr):
    """`Window.boundary`, the first token after the pruned range."""
    excess = tl.maximum(length - (SINK + RECENT), 0)
    return SINK + excess // 32 * 32


@triton.jit
def skip_archived(page, boundary, SINK: tl.constexpr):
    """Index in the window's block table of dense page `page`, counted without the pruned range."""
    return tl.where(page < SINK // 32, page, page + (boundary - SINK) // 32)


@triton.jit
def rescale(scores, m, RAGGED: tl.constexpr):
    """One step of the online softmax over scores `[tokens, columns]`, fp32, in units of log2.

    Returns the new maxima, the factor of what was summed before, and the new weights. With RAGGED
    a column may have no score above -inf yet.
    """
    m_new = tl.maximum(m, tl.max(scores, 0))
    m_safe = m_new
    if RAGGED:
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, tl.exp2(m - m_safe), tl.exp2(scores - m_safe[None, :])
