"""A running softmax over pages with queries in rows, for many queries of a request.

Scores are q K^T `[M, tokens]`, outputs p V `[M, head_dim]`: a tile of pages is read once for many
queries, whose weights go from one product to the next without leaving the registers.
"""

import triton
import triton.language as tl
from vllm_leank.kernels.pages import chunk_channels, key_tile, value_tile


@triton.jit
def _rescale(s, m, factor):
    """One step of the online softmax over scores `[M, tokens]`, fp32.

    m: the rows' maxima so far, in units of log2; `-inf` for a row that has seen nothing yet.
    factor: `[M]`, of the scores, into these units.

    Returns the new maxima, the factor of what was summed before, and the new weights.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * factor)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, tl.exp2(m - m_safe), tl.exp2(s * factor[:, None] - m_safe[:, None])


@triton.jit
def fold_window(m, l, acc, k, v, q, seen, scale_log2):
    """Take K and V of a window page into the running softmax.

    m, l: `[M]`; acc: `[M, D_PAD]`; k, v: `[32, D_PAD]`; q: `[M, D_PAD]`; seen: `[M, 32]`.
    """
    s = tl.where(seen, tl.dot(q, tl.trans(k)), float("-inf"))
    m, alpha, p = _rescale(s, m, tl.full([m.shape[0]], scale_log2, tl.float32))
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc=acc * alpha[:, None])
    return m, l, acc


@triton.jit
def _kept_query(
    p_q, m_q, p_channels, q_max, KEPT: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """The queries' channels of the K chunk of `WIDTH`, `[M, WIDTH]`. With scales in units of their
    largest value: so they fit into fp16, to which 8-bit numbers convert fast.
    """
    channel = chunk_channels(p_channels, KEPT, WIDTH)
    q = tl.load(p_q[:, None] + channel[None, :], mask=m_q[:, None], other=0.0)
    if TILES.SCALED:
        q = (q.to(tl.float32) / q_max[:, None]).to(tl.float16)
    return q


@triton.jit
def _add_scores(
    s, q, k_desc, archive_ptr, page, k_offset, slot, stride_page,
    KEPT: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Add the product of the queries and a tile of the K chunk of `WIDTH` to scores `[M, TILE]`."""
    k = key_tile(k_desc, archive_ptr, page, k_offset, slot, stride_page, KEPT, WIDTH, TILE, BLOCK,
                 TMA)  # fmt: skip
    return tl.dot(q, tl.trans(k.to(q.dtype)), acc=s)


@triton.jit
def fold_archive(
    m, l, acc, first, last, boundary, p_q, m_q, q_max, scale_log2,
    p_head, channels_ptr, p_table, k_descs, v_desc, archive_ptr, side_ptr,
    stride_page, stride_side,
    MASKED: tl.constexpr, SINK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    KEPT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Take archive tiles `first` to `last` of a head that keeps `KEPT` channels into the running
    softmax of `M` rows of queries, each of which sees the tokens from `SINK` to its `boundary`.
    Without MASKED these are all the tokens of the tiles.

    m, l, boundary: `[M]`; acc: `[M, D_PAD]`; p_q, m_q: `[M]`, the queries and which exist; q_max:
    `[M]`, used with scales, their largest absolute values.
    """
    p_channels = channels_ptr + tl.load(p_head + 1)
    k_offset = tl.load(p_head + 2)
    v_offset = tl.load(p_head + 3)
    side_offset = tl.load(p_head + 4)
    factor = tl.full([m.shape[0]], scale_log2, tl.float32)
    if TILES.SCALED:
        factor *= q_max
        # Weights times scales, of the order of V over UNIT, would leave the range of fp16.
        acc *= TILES.UNIT
    # Chunks have the widths of KEPT's binary digits, widest first: `CHUNK_WIDTHS`.
    queries = ()
    for c in tl.static_range(5):
        if KEPT & (256 >> c):
            part = _kept_query(p_q, m_q, p_channels, q_max, KEPT, 256 >> c, TILES)
            queries = queries + (part,)  # noqa: RUF005
        else:
            queries = queries + (0,)  # noqa: RUF005
    DOT: tl.constexpr = tl.float16 if TILES.SCALED else p_q.dtype.element_ty
    # One tile ahead, so that the pipeline of tiles does not wait for the block table.
    next_page = tl.load(p_table + first * TILE // BLOCK, mask=first < last, other=0)
    for i in tl.range(first, last, num_stages=STAGES):
        token = i * TILE
        page = next_page
        next_page = tl.load(p_table + tl.minimum(i + 1, last - 1) * TILE // BLOCK)
        slot = token % BLOCK
        s = tl.zeros([m.shape[0], TILE], tl.float32)
        for c in tl.static_range(5):
            if KEPT & (256 >> c):
                s = _add_scores(s, queries[c], k_descs[c], archive_ptr, page, k_offset, slot,
                                stride_page, KEPT, 256 >> c, TILE, BLOCK, TMA)  # fmt: skip
        v = value_tile(v_desc, archive_ptr, page, v_offset, slot, stride_page, D, D_PAD, TILE,
                       BLOCK, TMA).to(DOT)  # fmt: skip
        o_token = token + tl.arange(0, TILE)
        seen = (o_token[None, :] >= SINK) & (o_token[None, :] < boundary[:, None])
        if TILES.SCALED:
            p_scale = side_ptr + page.to(tl.int64) * stride_side + side_offset
            p_scale += o_token % BLOCK // 32 * 2
            s *= tl.load(p_scale)[None, :]
            v_scale = tl.load(p_scale + 1) * TILES.UNIT
        if MASKED:
            s = tl.where(seen, s, float("-inf"))
        m, alpha, p = _rescale(s, m, factor)
        l = l * alpha + tl.sum(p, 1)
        if TILES.SCALED:
            p *= v_scale[None, :]
            if MASKED:
                # Scales of steps that hold no token may hold anything.
                p = tl.where(seen, p, 0.0)
        acc = tl.dot(p.to(DOT), tl.trans(v), acc=acc * alpha[:, None])
    if TILES.SCALED:
        acc *= 1 / TILES.UNIT
    return m, l, acc
