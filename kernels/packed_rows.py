"""A running softmax over packed pages with queries in rows, for many queries of a request; see
`packed_columns` for the sums.
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
    turn_rows,
)
from vllm_leank.kernels.packed_query import read_rows, write_query
from vllm_leank.kernels.pages import scale_tile


@triton.jit
def _split_granules(x):
    """Columns `[M, TILE]` of granules of even and of odd number, `[M, TILE / 2]` each."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    x = tl.permute(tl.reshape(x, (M, N // 64, 2, 32)), (0, 1, 3, 2))
    even, odd = tl.split(x)
    return tl.reshape(even, (M, N // 2)), tl.reshape(odd, (M, N // 2))


@triton.jit
def _fold_head(
    m, l, acc, begin, stop, boundary, p_written, o_written, m_q, unit, added, head, p_head,
    order_ptr, numbers_ptr, p_table, descs, archive_ptr, side_ptr, stride_page, stride_side,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, VARIANT: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`fold_archive` of a head whose fields `VARIANT` describes, for queries that `write_query`
    left at `p_written`; unit, added: `[M]`, what products are worth, and what comes to the scores.
    """
    ASM: tl.constexpr = TILES.ASM
    M: tl.constexpr = m.shape[0]
    offset = tl.multiple_of(tl.load(p_head + 2), 16)
    side_offset = tl.load(p_head + 4)
    parts = read_rows(p_written, o_written, m_q, VARIANT)
    sums = ()
    for c in tl.static_range(3):
        if row_bytes(VARIANT, 3 + c) > 0:
            for _ in tl.static_range(1 << c):
                sums = sums + (tl.zeros([M, row_bytes(VARIANT, 3 + c)], tl.float32),)  # noqa: RUF005
    scaled = tl.zeros([M], tl.float32)
    first, last = begin // TILE, tl.cdiv(stop, TILE)
    next_page = tl.load(p_table + first * TILE // BLOCK, mask=first < last, other=0)
    for i in tl.range(first, last, num_stages=STAGES):
        token = i * TILE
        page = next_page
        next_page = tl.load(p_table + tl.minimum(i + 1, last - 1) * TILE // BLOCK)
        slot = token % BLOCK
        s = tl.zeros([M, TILE], tl.float32)
        for c in tl.static_range(3):
            if row_bytes(VARIANT, c) > 0:
                x = load_field(
                    descs, archive_ptr, page, offset, slot, stride_page, VARIANT, c, TILE, BLOCK,
                    TMA,
                )  # fmt: skip
                for part in tl.static_range(1 << c):
                    for lane in tl.static_range(lanes(VARIANT, c)):
                        codes = read_codes(x, 8 >> c, part, lane, ASM)
                        q = parts[first_product(VARIANT, c) + lanes(VARIANT, c) * part + lane]
                        s = tl.dot(q, tl.trans(codes), acc=s)
        o_token = token + tl.arange(0, TILE)
        seen = (o_token[None, :] >= begin) & (o_token[None, :] < boundary[:, None])
        # Scales of slots that hold no token may hold anything.
        stored = (o_token >= begin) & (o_token < stop)
        v_scale = scale_tile(
            descs[5], side_ptr, page, side_offset, slot, stride_side, TILE, BLOCK, TMA
        ).to(tl.float32)
        v_scale = tl.where(stored, v_scale, 0.0)
        s = tl.where(seen, s * unit[:, None] + added[:, None], float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m - m_safe)
        p = tl.exp2(s - m_safe[:, None])
        m = m_new
        l = l * alpha + tl.sum(p, 1)
        p = p * v_scale[None, :]
        scaled = scaled * alpha + tl.sum(p, 1)
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
                    total = sums[first_part(VARIANT, 3 + c) + part] * alpha[:, None]
                    for lane in tl.static_range(2):
                        codes = read_codes(x, 8 >> c, part, lane, ASM)
                        total = tl.dot(weights[lane], tl.trans(codes), acc=total)
                    new_sums = new_sums + (total,)  # noqa: RUF005
        sums = new_sums

    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    mean = tl.load(numbers_ptr + (2 * H + head) * D + o_d, mask=m_d, other=0.0)
    acc += mean[None, :] * l[:, None]
    places = tl.load(order_ptr + (2 * H + head) * D + o_d, mask=m_d, other=D)
    for c in tl.static_range(3):
        if row_bytes(VARIANT, 3 + c) > 0:
            for part in tl.static_range(1 << c):
                o_r = first_channel(VARIANT, 3 + c) + part * row_bytes(VARIANT, 3 + c)
                o_r += tl.arange(0, row_bytes(VARIANT, 3 + c))
                y = sums[first_part(VARIANT, 3 + c) + part] * power(24 - (8 >> c) * part)
                y -= scaled[:, None] * ((power(8 >> c) - 1) / 2)
                y *= tl.load(numbers_ptr + (3 * H + head) * D + o_r)[None, :]
                acc = turn_rows(
                    acc, places, y,
                    first_channel(VARIANT, 3 + c) + part * row_bytes(VARIANT, 3 + c),
                )  # fmt: skip
    return m, l, acc


@triton.jit
def fold_archive(
    m, l, acc, begin, first_boundary, stop, boundary, p_q, m_q, scale_log2,
    head, p_head, variant, order_ptr, numbers_ptr, p_table, descs, archive_ptr, side_ptr,
    stride_page, stride_side, p_written, o_written,
    SINK: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    VARIANTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `fold_rows.fold_archive`, for heads with fields as `VARIANTS` describe them. It comes
    first: `m`, `l` and `acc` have taken nothing in yet. Sums get into the order of channels in
    registers; by way of memory, as in `packed_columns`, that took longer.
    """
    unit, added = write_query(
        p_written, o_written, p_q, m_q,
        order_ptr + head * D, order_ptr + (4 * H + head) * D, numbers_ptr + head * D,
        numbers_ptr + (H + head) * D, numbers_ptr + (6 * H + head) * D, D, D_PAD, True,
    )  # fmt: skip
    unit *= CODE_UNIT * scale_log2
    added *= scale_log2
    tl.debug_barrier()
    for c in tl.static_range(len(VARIANTS)):
        if variant == VARIANTS[c]:
            m, l, acc = _fold_head(
                m, l, acc, begin, stop, boundary, p_written, o_written, m_q, unit, added, head,
                p_head, order_ptr, numbers_ptr, p_table, descs, archive_ptr, side_ptr, stride_page,
                stride_side, H, D, D_PAD, VARIANTS[c], TILE, BLOCK, TILES, TMA, STAGES,
            )  # fmt: skip
    return m, l, acc
