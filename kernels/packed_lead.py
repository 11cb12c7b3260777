"""Scores tokens of packed pages by the lead of their K: codes of the channels with most bits."""

import triton
import triton.language as tl
from vllm_leank.kernels.codes import (
    CODE_UNIT,
    lanes,
    lead_field,
    product_bytes,
    product_powers,
    read_codes,
    row_bytes,
)


@triton.jit
def lead_query(p_q, m_q, p_order, p_factor, VARIANT: tl.constexpr):
    """What a head's lead is multiplied by, of queries at `p_q` `[N]` of which `m_q` exist: for each
    part of bytes fp16 `[bytes / lanes, N]`, as in `packed_query.read_columns`, and what rounding
    takes from it, two tuples; and the unit of what comes out, `[N]`. With both, segments that are
    nearly alike come in the order of the definition.
    """
    LEAD: tl.constexpr = lead_field(VARIANT)
    W: tl.constexpr = row_bytes(VARIANT, LEAD)
    LANES: tl.constexpr = lanes(VARIANT, LEAD)
    largest = tl.full(m_q.shape, 1e-30, tl.float32)
    exact = ()
    for i in tl.static_range(LANES << LEAD):
        o_w = i // LANES * W + product_bytes(W, i % LANES, LANES)
        channel = tl.load(p_order + o_w)
        q = tl.load(p_q[None, :] + channel[:, None], mask=m_q[None, :], other=0.0).to(tl.float32)
        q *= tl.load(p_factor + o_w)[:, None]
        largest = tl.maximum(largest, tl.max(tl.abs(q), 0))
        exact = exact + (q,)  # noqa: RUF005
    # As in `packed_query.write_query`.
    unit = largest / 256
    parts, rests = (), ()
    for i in tl.static_range(LANES << LEAD):
        powers = product_powers(W, 8 >> LEAD, i // LANES, i % LANES, LANES)
        q = exact[i] * (1 / unit)[None, :] / powers[:, None]
        parts = parts + (q.to(tl.float16),)  # noqa: RUF005
        rests = rests + ((q - parts[i].to(tl.float32)).to(tl.float16),)  # noqa: RUF005
    return parts, rests, unit * CODE_UNIT


@triton.jit
def lead_scores(query, p_head, slot, VARIANT: tl.constexpr, ASM: tl.constexpr):
    """Products `[M, N]` of queries with the lead of tokens in `slot` `[M]` of a page in which the
    head begins at `p_head`, less what all tokens have in common.
    """
    LEAD: tl.constexpr = lead_field(VARIANT)
    W: tl.constexpr = row_bytes(VARIANT, LEAD)
    LANES: tl.constexpr = lanes(VARIANT, LEAD)
    parts, rests, unit = query
    p_rows = p_head + slot * W
    if LANES == 2:
        p_rows = p_rows.to(tl.pointer_type(tl.uint16))
    x = tl.load(p_rows[:, None] + tl.arange(0, W // LANES)[None, :])
    s = tl.zeros([slot.shape[0], unit.shape[0]], tl.float32)
    for i in tl.static_range(LANES << LEAD):
        codes = read_codes(x, 8 >> LEAD, i // LANES, i % LANES, ASM)
        s = tl.dot(codes, rests[i], acc=tl.dot(codes, parts[i], acc=s))
    return s * unit[None, :]
