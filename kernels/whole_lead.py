"""Scores tokens by the lead of their K, of pages that keep channels whole: their widest chunk."""

import triton
import triton.language as tl


@triton.constexpr_function
def widest(kept):
    """Width of the widest chunk of so many channels."""
    return 1 << kept.bit_length() - 1


@triton.jit
def lead_query(p_q, m_q, p_order, p_factor, KEPT: tl.constexpr):
    """See `packed_lead.lead_query`."""
    channel = tl.load(p_order + tl.arange(0, widest(KEPT)))
    return tl.load(p_q[None, :] + channel[:, None], mask=m_q[None, :], other=0.0)


@triton.jit
def lead_scores(query, p_head, slot, KEPT: tl.constexpr, ASM: tl.constexpr):
    """See `packed_lead.lead_scores`."""
    W: tl.constexpr = widest(KEPT)
    k = tl.load(p_head + slot[:, None] * W + tl.arange(0, W)[None, :])
    return tl.dot(k.to(query.dtype), query)
