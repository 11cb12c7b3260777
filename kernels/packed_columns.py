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
    values_of,
)
from vllm_leank.kernels.packed_query import all_alike, read_columns, write_query
from vllm_leank.kernels.pages import scale_tile, tile_place

SUM_ROWS = tl.constexpr(16)
"""Rows of partial sums: those of one matrix instruction."""


@triton.jit
def _add_scores(
    s, x, parts, FIRST: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """Add to scores `[TILE, N]` what a tile `x` of one K field gives."""
    for i in tl.static_range(LANES << C):
        codes = read_codes(x, 8 >> C, i // LANES, i % LANES, ASM)
        s = tl.dot(codes, parts[FIRST + i], acc=s)
    return s


@triton.jit
def _one_of_each(x, ALIKE: tl.constexpr):
    """Of columns `[M, N]` of which so many next to each other are alike, one each."""
    if ALIKE == 2:
        x, _ = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return x


@triton.jit
def _sum_rows(x):
    """Sums over rows of `x` `[M, N]` as `[SUM_ROWS, N]`, for which each thread has what it needs: a
    sum over all rows would make threads wait for each other.
    """
    return tl.sum(tl.reshape(x, (x.shape[0] // SUM_ROWS, SUM_ROWS, x.shape[1])), 0)


@triton.jit
def _split_granules(x):
    """Rows `[TILE, N]` of granules of even and of odd number, `[TILE / 2, N]` each."""
    M: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    x = tl.permute(tl.reshape(x, (M // 64, 2, 32, N)), (0, 2, 3, 1))
    even, odd = tl.split(x)
    return tl.reshape(even, (M // 2, N)), tl.reshape(odd, (M // 2, N))


@triton.jit
def _fold_head(
    page, tile, first, last, boundary, head, offset, side_offset, order_ptr, numbers_ptr,
    p_table, descs, archive_ptr, side_ptr, stride_page, stride_side, p_scratch, p_lse,
    SINK: tl.constexpr, H: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr,
    VARIANT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr, SELECTED: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Of a head whose fields `VARIANT` describes, for queries that `write_query` left at
    `p_scratch`, with what a product of theirs is worth at `p_lse`: outputs without V's means, fp32
    `[N, D]` in the order of channels, those of channels that are not stored left as they were, and
    logarithms, base 2, of sums of weights, less what is added to all scores of a query, take the
    place of that. `page` and `tile` are those of `first`.
    """
    ASM: tl.constexpr = TILES.ASM
    N: tl.constexpr = G_PAD
    U: tl.constexpr = G_PAD // ALIKE
    o_q = tl.arange(0, U)
    m_q = o_q < G
    p_written = p_scratch.to(tl.pointer_type(tl.float16))
    parts = read_columns(p_written, m_q, D, VARIANT, ALIKE)
    unit = tl.load(p_lse + o_q, mask=m_q, other=1.0)[None, :]
    sums = ()
    for c in tl.static_range(3):
        if row_bytes(VARIANT, 3 + c) > 0:
            for _ in tl.static_range(1 << c):
                sums = sums + (tl.zeros([row_bytes(VARIANT, 3 + c), N], tl.float32),)  # noqa: RUF005
    m = tl.full([1, U], float("-inf"), tl.float32)
    l_rows = tl.zeros([SUM_ROWS, U], tl.float32)
    # Sums of weights times scales, as products see them: in each row the same.
    scaled_rows = tl.zeros([SUM_ROWS, N], tl.float32)
    ones = tl.full([SUM_ROWS, TILE // 2], 1.0, tl.float16)
    for i in tl.range(first, last, num_stages=STAGES):
        token, slot = tile * TILE, tile * TILE % BLOCK
        this = page
        # One tile ahead, so that the pipeline of tiles does not wait for the block table.
        page, tile = tile_place(p_table, tl.minimum(i + 1, last - 1), True, TILE, BLOCK, SELECTED)
        s = tl.zeros([TILE, N], tl.float32)
        for c in tl.static_range(3):
            if row_bytes(VARIANT, c) > 0:
                x = load_field(
                    descs, archive_ptr, this, offset, slot, stride_page, VARIANT, c, TILE, BLOCK,
                    TMA,
                )  # fmt: skip
                s = _add_scores(s, x, parts, first_product(VARIANT, c), c, lanes(VARIANT, c), ASM)
        s = _one_of_each(s, ALIKE)
        o_token = token + tl.arange(0, TILE)
        seen = o_token < boundary
        if SINK % TILE != 0:
            seen &= o_token >= SINK
        v_scale = scale_tile(
            descs[5], side_ptr, this, side_offset, slot, stride_side, TILE, BLOCK, TMA
        ).to(tl.float32)
        # Scales of slots that hold no token may hold anything.
        v_scale = tl.where(seen, v_scale, 0.0)
        s = tl.where(seen[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 0)[None, :] * unit)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * unit - m_new)
        m = m_new
        l_rows = l_rows * alpha + _sum_rows(p)
        alpha = all_alike(alpha, ALIKE)
        even, odd = _split_granules(p * v_scale[:, None])
        odd *= power(-shift(0, 0, 1))
        weights = (
            all_alike(even.to(tl.float16), ALIKE),
            all_alike(odd.to(tl.float16), ALIKE),
        )
        scaled_rows *= alpha
        for lane in tl.static_range(2):
            scaled_rows = tl.dot(ones * power(shift(0, 0, lane)), weights[lane], acc=scaled_rows)
        new_sums = ()
        for c in tl.static_range(3):
            if row_bytes(VARIANT, 3 + c) > 0:
                x = load_field(
                    descs, archive_ptr, this, offset, slot, stride_page, VARIANT, 3 + c, TILE,
                    BLOCK, TMA,
                )  # fmt: skip
                for part in tl.static_range(1 << c):
                    total = sums[first_part(VARIANT, 3 + c) + part] * alpha
                    for lane in tl.static_range(2):
                        codes = read_codes(x, 8 >> c, part, lane, ASM)
                        total = tl.dot(codes, weights[lane], acc=total)
                    new_sums = new_sums + (total,)  # noqa: RUF005
        sums = new_sums

    l = tl.sum(l_rows, 0)
    inverse = (1 / l)[None, :]
    scaled = tl.sum(_one_of_each(scaled_rows, ALIKE), 0) / SUM_ROWS
    # Other threads may still be reading the queries.
    tl.debug_barrier()
    tl.store(p_lse + o_q, tl.reshape(m, (U,)) + tl.log2(l), mask=m_q)
    p_columns = p_scratch + o_q[None, :] * D
    p_order = order_ptr + (H + head) * D
    for c in tl.static_range(3):
        if row_bytes(VARIANT, 3 + c) > 0:
            for part in tl.static_range(1 << c):
                o_r = first_channel(VARIANT, 3 + c) + part * row_bytes(VARIANT, 3 + c)
                o_r += tl.arange(0, row_bytes(VARIANT, 3 + c))
                y = _one_of_each(sums[first_part(VARIANT, 3 + c) + part], ALIKE)
                y = y * power(24 - (8 >> c) * part) - scaled[None, :] * ((power(8 >> c) - 1) / 2)
                y *= tl.load(numbers_ptr + (3 * H + head) * D + o_r)[:, None] * inverse
                tl.store(p_columns + tl.load(p_order + o_r)[:, None], y, mask=m_q[None, :])


FEW_VARIANTS = tl.constexpr(4)

_fold_head_alone = triton.jit(noinline=True)(_fold_head.fn)
"""The same as a function of its own, for kernels of more than `FEW_VARIANTS`: a pass of Triton's
takes time that grows with the square of a function's length, so that these compile in a quarter of
the time."""


@triton.jit
def fold_archive(
    first, last, boundary, p_q, scale_log2,
    head, p_head, variant, order_ptr, numbers_ptr, p_table, descs, archive_ptr, side_ptr,
    stride_page, stride_side, p_scratch, p_lse,
    SINK: tl.constexpr, H: tl.constexpr, G: tl.constexpr, G_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr,
    VARIANTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr, SELECTED: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """As `fold_columns.fold_archive`, for heads with fields as `VARIANTS` describe them; what comes
    back are logarithms of sums of weights, ones for sums, and outputs.

    Channels change their order in memory of the program's own, fp32 `[N, D]` at `p_scratch`: in
    registers that takes thousands of instructions, and where programs are short, it is fetching
    instructions that they wait for. So what is the same for all variants is there once, and what a
    variant's branch takes and gives goes through memory as well: Triton's compiler has failed at
    values that many branches share.
    """
    U: tl.constexpr = G_PAD // ALIKE
    o_q = tl.arange(0, U)
    m_q = o_q < G
    offset = tl.multiple_of(tl.load(p_head + 2), 16)
    side_offset = tl.load(p_head + 4)
    page, tile = tile_place(p_table, first, True, TILE, BLOCK, SELECTED)
    unit, added = write_query(
        p_scratch.to(tl.pointer_type(tl.float16)), o_q * D, p_q, m_q, order_ptr + head * D,
        order_ptr + (4 * H + head) * D, numbers_ptr + head * D, numbers_ptr + (H + head) * D,
        numbers_ptr + (6 * H + head) * D, D, D_PAD, False,
    )  # fmt: skip
    tl.store(p_lse + o_q, unit * (CODE_UNIT * scale_log2), mask=m_q)
    tl.debug_barrier()
    for c in tl.static_range(len(VARIANTS)):
        if variant == VARIANTS[c]:
            (_fold_head_alone if len(VARIANTS) > FEW_VARIANTS else _fold_head)(
                page, tile, first, last, boundary, head, offset, side_offset, order_ptr,
                numbers_ptr, p_table, descs, archive_ptr, side_ptr, stride_page, stride_side,
                p_scratch, p_lse, SINK, H, G, G_PAD, D, VARIANTS[c], TILE, BLOCK, TILES, TMA,
                STAGES, SELECTED, ALIKE,
            )  # fmt: skip
    tl.debug_barrier()
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    o_query = tl.arange(0, G_PAD) // ALIKE
    places = tl.load(order_ptr + (2 * H + head) * D + o_d, mask=m_d, other=D)
    stored = places < values_of(variant)
    acc = tl.load(
        p_scratch + o_d[:, None] + o_query[None, :] * D,
        mask=stored[:, None] & (o_query < G)[None, :], other=0.0,
    )  # fmt: skip
    mean = tl.load(numbers_ptr + (2 * H + head) * D + o_d, mask=m_d, other=0.0)
    m = tl.load(p_lse + o_q, mask=m_q, other=0.0) + added * scale_log2
    m = tl.reshape(all_alike(m[None, :], ALIKE), (U * ALIKE,))
    # The program's results will take the place of these.
    tl.debug_barrier()
    return m, tl.full(m.shape, 1.0, tl.float32), acc + mean[:, None]
