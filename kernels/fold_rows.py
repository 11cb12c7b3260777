"""A running softmax over pages with queries in rows, for many queries of a request.

Scores are q K^T `[M, tokens]`, outputs p V `[M, head_dim]`: a tile of pages is read once for many
queries, whose weights go from one product to the next without leaving the registers.
"""

import triton
import triton.language as tl
from vllm_leank.kernels.pages import chunk_channels, key_tile, value_tile


@triton.jit
def _rescale(s, m, factor, added):
    """One step of the online softmax over scores `[M, tokens]`, fp32.

    m: the rows' maxima so far, in units of log2; `-inf` for a row that has seen nothing yet.
    factor: `[M]`, of the scores, into these units; added: `[M]`, to them, in these units.

    Returns the new maxima, the factor of what was summed before, and the new weights.
    """
    m_new = tl.maximum(m, tl.max(s, 1) * factor + added)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    return m_new, tl.exp2(m - m_safe), tl.exp2(s * factor[:, None] + (added - m_safe)[:, None])


@triton.jit
def fold_window(m, l, acc, k, v, q, seen, scale_log2):
    """Take K and V of a window page into the running softmax.

    m, l: `[M]`; acc: `[M, D_PAD]`; k, v: `[32, D_PAD]`; q: `[M, D_PAD]`; seen: `[M, 32]`.
    """
    s = tl.where(seen, tl.dot(q, tl.trans(k)), float("-inf"))
    m, alpha, p = _rescale(s, m, tl.full([m.shape[0]], scale_log2, tl.float32), tl.zeros_like(m))
    l = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc=acc * alpha[:, None])
    return m, l, acc


@triton.jit
def _kept_query(
    p_q, m_q, p_channels, KEPT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The queries' channels of the K chunk of `WIDTH`, `[M, WIDTH]`."""
    channel = chunk_channels(p_channels, KEPT, WIDTH)
    return tl.load(p_q[:, None] + channel[None, :], mask=m_q[:, None], other=0.0)


@triton.jit
def mean_scores(p_q, m_q, p_order, p_mean, D: tl.constexpr, D_PAD: tl.constexpr):
    """What the means of channels that are not stored add to each query's scores, `[M]`."""
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    channel = tl.load(p_order + o_d, mask=m_d, other=0)
    q = tl.load(p_q[:, None] + channel[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)
    mean = tl.load(p_mean + o_d, mask=m_d, other=0.0)
    return tl.sum(q.to(tl.float32) * mean[None, :], 1)


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
def _fold_tiles(
    m, l, acc, first, last, boundary, p_q, m_q, scale_log2,
    added, p_channels, k_offset, p_table, descs, archive_ptr, stride_page,
    MASKED: tl.constexpr, SINK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    KEPT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Take archive tiles `first` to `last` of a head that keeps `KEPT` channels into the running
    softmax of `M` rows of queries, each of which sees the tokens from `SINK` to its `boundary`.
    Without MASKED these are all the tokens of the tiles.

    m, l, boundary: `[M]`; acc: `[M, D_PAD]`; p_q, m_q: `[M]`, the queries and which exist.
    """
    v_offset = k_offset + KEPT * BLOCK
    factor = tl.full([m.shape[0]], scale_log2, tl.float32)
    # Chunks have the widths of KEPT's binary digits, widest first: `CHUNK_WIDTHS`.
    queries = ()
    for c in tl.static_range(5):
        if KEPT & (256 >> c):
            part = _kept_query(p_q, m_q, p_channels, KEPT, 256 >> c)
            queries = queries + (part,)  # noqa: RUF005
        else:
            queries = queries + (0,)  # noqa: RUF005
    DOT: tl.constexpr = p_q.dtype.element_ty
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
                s = _add_scores(s, queries[c], descs[1 + c], archive_ptr, page, k_offset, slot,
                                stride_page, KEPT, 256 >> c, TILE, BLOCK, TMA)  # fmt: skip
        v = value_tile(descs[0], archive_ptr, page, v_offset, slot, stride_page, D, D_PAD, TILE,
                       BLOCK, TMA).to(DOT)  # fmt: skip
        o_token = token + tl.arange(0, TILE)
        seen = (o_token[None, :] >= SINK) & (o_token[None, :] < boundary[:, None])
        if MASKED:
            s = tl.where(seen, s, float("-inf"))
        m, alpha, p = _rescale(s, m, factor, added)
        l = l * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(DOT), tl.trans(v), acc=acc * alpha[:, None])
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
    """Take the tokens from `begin` to `stop` into the running softmax of `M` rows of queries, each
    of which sees those to its `boundary`, of which `first_boundary` is the least. Of whole channels
    nothing is unpacked: `begin` is `SINK`.

    p_q, m_q: `[M]`, the queries, and which exist; variant: of the head, one of `VARIANTS`, here the
    channels of K that it keeps; p_written: fp16, where each query has `D` numbers of its own, from
    `o_written` `[M]` on, not used here.
    """
    p_channels = order_ptr + head * D
    added = mean_scores(p_q, m_q, p_channels, numbers_ptr + head * D, D, D_PAD) * scale_log2
    k_offset = tl.load(p_head + 2)
    # Tiles of which every query sees every token lie between those where sink tokens end and where
    # boundaries lie.
    full = tl.cdiv(SINK, TILE)
    full_stop = tl.maximum(first_boundary // TILE, full)
    for c in tl.static_range(len(VARIANTS)):
        if variant == VARIANTS[c]:
            for part in tl.static_range(1 if SINK % TILE == 0 else 0, 3):
                if part == 0:
                    first, last = full - 1, full
                elif part == 1:
                    first, last = full, full_stop
                else:
                    first, last = full_stop, tl.cdiv(stop, TILE)
                m, l, acc = _fold_tiles(
                    m, l, acc, first, last, boundary, p_q, m_q, scale_log2,
                    added, p_channels, k_offset, p_table, descs, archive_ptr, stride_page,
                    part != 1, SINK, D, D_PAD, VARIANTS[c], TILE, BLOCK, TMA, STAGES,
                )  # fmt: skip
    return m, l, acc
