"""A running softmax over pages with queries in columns, for the few queries of a decode step.

Scores are K q^T `[tokens, N]`, outputs V^T p `[head_dim, N]`: a few queries take 8 columns, the
fewest that tensor cores have, and tiles of pages go to them as they lie.
"""

import triton
import triton.language as tl
from vllm_leank.kernels.common import skip_archived
from vllm_leank.kernels.pages import (
    chunk_channels,
    key_tile,
    page_of,
    row_of,
    tile_place,
    value_tile,
    window_tile,
)


@triton.jit
def _rescale(scores, m):
    """One step of the online softmax over scores `[tokens, N]`, fp32, in units of log2, of which
    each column has one.

    Returns the new maxima, the factor of what was summed before, and the new weights.
    """
    m_new = tl.maximum(m, tl.max(scores, 0))
    return m_new, tl.exp2(m - m_new), tl.exp2(scores - m_new[None, :])


@triton.jit
def _fold_window(m, l_rows, acc, k, v, q, seen, scale_log2, MASKED: tl.constexpr):
    """Take K and V of a window tile `[tokens, head_dim]` into the running softmax.

    l_rows: the softmax's sum `[tokens, N]`, still to be summed over rows; seen: which tokens are
    seen, `[tokens, 1]`, used with MASKED.
    """
    s = tl.dot(k, q) * scale_log2
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    m, alpha, p = _rescale(s, m)
    l_rows = l_rows * alpha[None, :] + p
    acc = tl.dot(tl.trans(v), p.to(v.dtype), acc=acc * alpha[None, :])
    return m, l_rows, acc


@triton.jit
def fold_granules(
    m, l, acc, first, last, n_dense, length, boundary, p_q, m_g, scale_log2, head, p_table,
    window_desc, window_ptr, stride_page,
    SINK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Take dense granules `first` to `last` of the `n_dense` of a request of `length` tokens into
    the running softmax of `N` columns of queries at `p_q` `[N]`, of which `m_g` exist.

    m, l: `[N]`; acc: `[D_PAD, N]`; p_table: the request's window pages; TILE: tokens that are read
    at once, a part of a granule.
    """
    PARTS: tl.constexpr = 32 // TILE
    o_d = tl.arange(0, D_PAD)
    q = tl.load(
        p_q[None, :] + o_d[:, None], mask=m_g[None, :] & (o_d[:, None] < D), other=0.0
    )  # [D_PAD, N]  # fmt: skip
    full = tl.minimum(last, n_dense - 1)
    # What was summed before goes on in one of the rows.
    o_row = tl.arange(0, TILE)[:, None]
    l_rows = tl.where(o_row == 0, l[None, :], 0.0)
    next_page = page_of(p_table, skip_archived(first, boundary, SINK), WINDOW_BLOCK)
    for i in tl.range(first * PARTS, full * PARTS, num_stages=STAGES):
        page = next_page
        following = tl.minimum((i + 1) // PARTS, full - 1)
        next_page = page_of(p_table, skip_archived(following, boundary, SINK), WINDOW_BLOCK)
        first_row = row_of(skip_archived(i // PARTS, boundary, SINK), WINDOW_BLOCK)
        k, v = window_tile(
            window_desc, window_ptr, page, head, first_row + i % PARTS * TILE, stride_page, D,
            D_PAD, WINDOW_BLOCK, TILE, TMA,
        )  # fmt: skip
        m, l_rows, acc = _fold_window(m, l_rows, acc, k, v, q, 0, scale_log2, False)
    if last == n_dense:
        # The last granule may be partly unwritten: that must not reach the product.
        granule = skip_archived(n_dense - 1, boundary, SINK)
        page = page_of(p_table, granule, WINDOW_BLOCK)
        first_row = row_of(granule, WINDOW_BLOCK)
        for row in tl.range(0, (length - 1) % 32 + 1, TILE, num_stages=1):
            k, v = window_tile(
                window_desc, window_ptr, page, head, first_row + row, stride_page, D, D_PAD,
                WINDOW_BLOCK, TILE, TMA,
            )  # fmt: skip
            written = row + o_row <= (length - 1) % 32
            v = tl.where(written, v, 0.0)
            m, l_rows, acc = _fold_window(m, l_rows, acc, k, v, q, written, scale_log2, True)
    return m, tl.sum(l_rows, 0), acc


@triton.jit
def _kept_query(
    p_q, m_q, p_channels, KEPT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """The queries' channels of the K chunk of `WIDTH`, `[WIDTH, N]`."""
    channel = chunk_channels(p_channels, KEPT, WIDTH)
    return tl.load(p_q[None, :] + channel[:, None], mask=m_q[None, :], other=0.0)


@triton.jit
def mean_scores(p_q, m_q, p_order, p_mean, D: tl.constexpr, D_PAD: tl.constexpr):
    """What the means of channels that are not stored add to each query's scores, `[N]`."""
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    channel = tl.load(p_order + o_d, mask=m_d, other=0)
    q = tl.load(p_q[None, :] + channel[:, None], mask=m_d[:, None] & m_q[None, :], other=0.0)
    mean = tl.load(p_mean + o_d, mask=m_d, other=0.0)
    return tl.sum(q.to(tl.float32) * mean[:, None], 0)


@triton.jit
def _add_scores(
    s, q, k_desc, archive_ptr, page, k_offset, slot, stride_page,
    KEPT: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Add the product of a tile of the K chunk of `WIDTH` and the queries to scores `[TILE, N]`."""
    k = key_tile(k_desc, archive_ptr, page, k_offset, slot, stride_page, KEPT, WIDTH, TILE, BLOCK,
                 TMA)  # fmt: skip
    return tl.dot(k.to(q.dtype), q, acc=s)


@triton.jit
def _fold_head(
    m, l, acc, first, last, boundary, p_q, m_q, scale_log2, head, k_offset, order_ptr, numbers_ptr,
    p_table, descs, archive_ptr, stride_page,
    SINK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, KEPT: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
    SELECTED: tl.constexpr,
):  # fmt: skip
    """`fold_archive` of a head that keeps `KEPT` channels of K."""
    p_channels = order_ptr + head * D
    v_offset = k_offset + KEPT * BLOCK
    added = mean_scores(p_q, m_q, p_channels, numbers_ptr + head * D, D, D_PAD) * scale_log2
    # Chunks have the widths of KEPT's binary digits, widest first: `CHUNK_WIDTHS`.
    queries = ()
    for c in tl.static_range(5):
        if KEPT & (256 >> c):
            part = _kept_query(p_q, m_q, p_channels, KEPT, 256 >> c)
            queries = queries + (part,)  # noqa: RUF005
        else:
            queries = queries + (0,)  # noqa: RUF005
    # Each row keeps a sum of its own until the end: a sum over rows would make all warps wait.
    l_rows = tl.zeros([TILE, m.shape[0]], tl.float32)
    # One tile ahead, so that the pipeline of tiles does not wait for the block table.
    following, tile = tile_place(p_table, first, first < last, TILE, BLOCK, SELECTED)
    for i in tl.range(first, last, num_stages=STAGES):
        token, slot = tile * TILE, tile * TILE % BLOCK
        page = following
        following, tile = tile_place(
            p_table, tl.minimum(i + 1, last - 1), True, TILE, BLOCK, SELECTED
        )
        s = tl.zeros([TILE, m.shape[0]], tl.float32)
        for c in tl.static_range(5):
            if KEPT & (256 >> c):
                s = _add_scores(s, queries[c], descs[1 + c], archive_ptr, page, k_offset, slot,
                                stride_page, KEPT, 256 >> c, TILE, BLOCK, TMA)  # fmt: skip
        v = value_tile(descs[0], archive_ptr, page, v_offset, slot, stride_page, D, D_PAD, TILE,
                       BLOCK, TMA).to(p_q.dtype.element_ty)  # fmt: skip
        o_token = token + tl.arange(0, TILE)
        seen = (o_token >= SINK) & (o_token < boundary)
        s = s * scale_log2 + added[None, :]
        m, alpha, p = _rescale(tl.where(seen[:, None], s, float("-inf")), m)
        l *= alpha
        l_rows = l_rows * alpha[None, :] + p
        acc = tl.dot(v, p.to(p_q.dtype.element_ty), acc=acc * alpha[None, :])
    l += tl.sum(l_rows, 0)
    return m, l, acc


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
    """A running softmax of `G_PAD` columns of queries over archive tiles `first` to `last`, of
    tokens from `SINK` to `boundary`: maxima and sums of weights `[G_PAD]`, and sums over V
    `[D_PAD, G_PAD]`.

    p_q: `[G_PAD / ALIKE]`, the queries, of which the first `G` exist; each has `ALIKE` columns,
    here one; variant: of the head, one of `VARIANTS`; p_scratch, p_lse: where the program's results
    go, its own memory until then, not used here. SELECTED: `p_table` has the tiles that are read,
    as `tile_place` says; `first` and `last` count among these.
    """
    m_q = tl.arange(0, G_PAD) < G
    m = tl.full([G_PAD], float("-inf"), tl.float32)
    l = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([D_PAD, G_PAD], tl.float32)
    k_offset = tl.load(p_head + 2)
    for c in tl.static_range(len(VARIANTS)):
        if variant == VARIANTS[c]:
            m, l, acc = _fold_head(
                m, l, acc, first, last, boundary, p_q, m_q, scale_log2, head, k_offset, order_ptr,
                numbers_ptr, p_table, descs, archive_ptr, stride_page, SINK, D, D_PAD, VARIANTS[c],
                TILE, BLOCK, TMA, STAGES, SELECTED,
            )  # fmt: skip
    return m, l, acc
