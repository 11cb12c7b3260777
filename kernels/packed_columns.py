"""A running softmax over packed pages with queries in columns, for the few queries of a decode
step; `fold_columns` has the same for pages that keep channels whole.

The sum of q times K is one of products of codes: steps and scales are in the query, and a number
per query stands for what lies between codes and K. V is the sum of codes times the token's scale;
its steps, scales and means come in at the end.
"""

import triton
import triton.language as tl
from vllm_leank.kernels.codes import (
    CODE_UNIT,
    first_channel,
    first_part,
    first_product,
    lanes,
    load_field,
    power,
    read_codes,
    row_bytes,
    shift,
    turn,
)
from vllm_leank.kernels.pages import scale_tile

SUM_ROWS = tl.constexpr(16)


@triton.jit
def _query_part(
    p_q, m_q, p_order, p_factor, unit, first, W: tl.constexpr, BITS: tl.constexpr,
    PART: tl.constexpr, LANE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """What a part of the bytes of one K field is multiplied by, or of every other of them with two
    lanes, fp16 `[W / LANES, N]` in units of `unit`; and what half of the largest code gives, to be
    taken off, `[N]`.
    """
    SHIFT: tl.constexpr = shift(BITS, PART, LANE)
    o_w = first + PART * W + tl.arange(0, W // LANES) * LANES + LANE
    channel = tl.load(p_order + o_w)
    q = tl.load(p_q[None, :] + channel[:, None], mask=m_q[None, :], other=0.0).to(tl.float32)
    q = q * tl.load(p_factor + o_w)[:, None] / unit[None, :]
    # Codes are read as they lie in their bytes.
    q = (q * power(-SHIFT)).to(tl.float16)
    half = tl.sum(q.to(tl.float32), 0) * (power(SHIFT) * (power(BITS) - 1) / 2)
    return q, half


@triton.jit
def _query(
    p_q, m_q, p_order, p_mean, p_factor, D: tl.constexpr, D_PAD: tl.constexpr,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """The queries as codes of K are multiplied by them, a tuple of parts; the unit that they are
    in; and what has to be added to each query's scores.
    """
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    channel = tl.load(p_order + o_d, mask=m_d, other=0)
    q = tl.load(p_q[None, :] + channel[:, None], mask=m_d[:, None] & m_q[None, :], other=0.0)
    q = q.to(tl.float32)
    # The largest is 256, so that all fit into fp16, and with the codes' shifts keep their digits.
    factor = tl.load(p_factor + o_d, mask=m_d, other=0.0)
    unit = tl.maximum(tl.max(tl.abs(q * factor[:, None]), 0) / 256, 1e-30)
    offset = tl.sum(q * tl.load(p_mean + o_d, mask=m_d, other=0.0)[:, None], 0)
    parts = ()
    for c in tl.static_range(3):
        if row_bytes(VARIANT, c) > 0:
            for i in tl.static_range(1 << c):
                for lane in tl.static_range(lanes(VARIANT, c)):
                    part, half = _query_part(
                        p_q, m_q, p_order, p_factor, unit, first_channel(VARIANT, c),
                        row_bytes(VARIANT, c), 8 >> c, i, lane, lanes(VARIANT, c),
                    )  # fmt: skip
                    parts = parts + (part,)  # noqa: RUF005
                    offset -= half * unit
    return parts, unit, offset


@triton.jit
def _add_scores(
    s, x, parts, FIRST: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """Add to scores `[TILE, N]` what a tile `x` of one K field gives."""
    for i in tl.static_range(1 << C):
        for lane in tl.static_range(LANES):
            codes = read_codes(x, 8 >> C, i, lane, ASM)
            s = tl.dot(codes, parts[FIRST + LANES * i + lane], acc=s)
    return s


@triton.jit
def _sum_rows(x):
    """Sums over rows of `x` `[M, N]` as `[SUM_ROWS, N]`, of which each thread has all that it needs:
    a sum over all rows would make threads wait for each other.
    """
    return tl.sum(tl.reshape(x, (x.shape[0] // SUM_ROWS, SUM_ROWS, x.shape[1])), 0)


@triton.jit
def _split_granules(x):
    """Rows `[TILE, N]` of the granules of even number, and of odd number, `[TILE / 2, N]` each."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    x = tl.permute(tl.reshape(x, (M // 64, 2, 32, N)), (0, 2, 3, 1))
    even, odd = tl.split(x)
    return tl.reshape(even, (M // 2, N)), tl.reshape(odd, (M // 2, N))


@triton.jit
def fold_archive(
    m, l, acc, first, last, boundary, q, p_q, m_q, scale_log2,
    head, p_head, order_ptr, numbers_ptr, p_table, descs, archive_ptr, side_ptr,
    stride_page, stride_side,
    SINK: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    VARIANT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `fold_columns.fold_archive`, for a head whose fields `VARIANT` describes. It comes first:
    `m`, `l` and `acc` have taken nothing in yet.
    """
    ASM: tl.constexpr = TILES.ASM
    N: tl.constexpr = m.shape[0]
    offset = tl.load(p_head + 2)
    side_offset = tl.load(p_head + 4)
    parts, unit, added = _query(
        p_q, m_q, order_ptr + head * D, numbers_ptr + head * D, numbers_ptr + (H + head) * D,
        D, D_PAD, VARIANT,
    )  # fmt: skip
    unit *= CODE_UNIT * scale_log2
    added *= scale_log2
    sums = ()
    for c in tl.static_range(3):
        if row_bytes(VARIANT, 3 + c) > 0:
            for _ in tl.static_range(1 << c):
                sums = sums + (tl.zeros([row_bytes(VARIANT, 3 + c), N], tl.float32),)  # noqa: RUF005
    l_rows = tl.zeros([SUM_ROWS, N], tl.float32)
    s_rows = tl.zeros([SUM_ROWS, N], tl.float32)
    # One tile ahead, so that the pipeline of tiles does not wait for the block table.
    next_page = tl.load(p_table + first * TILE // BLOCK, mask=first < last, other=0)
    for i in tl.range(first, last, num_stages=STAGES):
        token = i * TILE
        page = next_page
        next_page = tl.load(p_table + tl.minimum(i + 1, last - 1) * TILE // BLOCK)
        slot = token % BLOCK
        s = tl.zeros([TILE, N], tl.float32)
        for c in tl.static_range(3):
            if row_bytes(VARIANT, c) > 0:
                x = load_field(
                    descs, archive_ptr, page, offset, slot, stride_page, VARIANT, c, TILE, BLOCK,
                    TMA,
                )  # fmt: skip
                s = _add_scores(s, x, parts, first_product(VARIANT, c), c, lanes(VARIANT, c), ASM)
        o_token = token + tl.arange(0, TILE)
        seen = (o_token >= SINK) & (o_token < boundary)
        v_scale = scale_tile(
            descs[10], side_ptr, page, side_offset, slot, stride_side, TILE, BLOCK, TMA
        ).to(tl.float32)
        # Scales of slots that hold no token may hold anything.
        v_scale = tl.where(seen, v_scale, 0.0)
        s = tl.where(seen[:, None], s * unit[None, :] + added[None, :], float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 0))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[None, :])
        m = m_new
        l_rows = l_rows * alpha[None, :] + _sum_rows(p)
        p = p * v_scale[:, None]
        s_rows = s_rows * alpha[None, :] + _sum_rows(p)
        even, odd = _split_granules(p)
        weights = even.to(tl.float16), (odd * power(-shift(0, 0, 1))).to(tl.float16)
        new_sums = ()
        for c in tl.static_range(3):
            if row_bytes(VARIANT, 3 + c) > 0:
                x = load_field(
                    descs, archive_ptr, page, offset, slot, stride_page, VARIANT, 3 + c, TILE,
                    BLOCK, TMA,
                )  # fmt: skip
                for part in tl.static_range(1 << c):
                    total = sums[first_part(VARIANT, 3 + c) + part] * alpha[None, :]
                    for lane in tl.static_range(2):
                        codes = read_codes(x, 8 >> c, part, lane, ASM)
                        total = tl.dot(codes, weights[lane], acc=total)
                    new_sums = new_sums + (total,)  # noqa: RUF005
        sums = new_sums

    far, scaled = tl.sum(l_rows, 0), tl.sum(s_rows, 0)
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    mean = tl.load(numbers_ptr + (2 * H + head) * D + o_d, mask=m_d, other=0.0)
    acc += mean[:, None] * far[None, :]
    places = tl.load(order_ptr + (2 * H + head) * D + o_d, mask=m_d, other=D)
    for c in tl.static_range(3):
        if row_bytes(VARIANT, 3 + c) > 0:
            for part in tl.static_range(1 << c):
                o_r = first_channel(VARIANT, 3 + c) + part * row_bytes(VARIANT, 3 + c)
                o_r += tl.arange(0, row_bytes(VARIANT, 3 + c))
                y = sums[first_part(VARIANT, 3 + c) + part] * power(24 - (8 >> c) * part)
                y -= scaled[None, :] * ((power(8 >> c) - 1) / 2)
                y *= tl.load(numbers_ptr + (3 * H + head) * D + o_r)[:, None]
                acc = turn(
                    acc, places, y,
                    first_channel(VARIANT, 3 + c) + part * row_bytes(VARIANT, 3 + c),
                )  # fmt: skip
    return m, l + far, acc
