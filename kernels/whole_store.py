"""Encodes granules into pages that keep channels whole."""

import triton
import triton.language as tl
from vllm_leank.kernels.pages import page_of, row_of


@triton.jit
def compact(
    start, stop, step, kept, head, p_head,
    window_ptr, archive_ptr, side_ptr, p_window_table, p_archive_table,
    order_ptr, numbers_ptr, columns_ptr,
    stride_window_page, stride_archive_page, stride_side,
    VARIANTS: tl.constexpr, SINK: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, KEPT_PAD: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Every `step`-th granule from `start` to `stop`, of a head that keeps `kept` channels."""
    v_offset = tl.load(p_head + 2) + kept * BLOCK
    o_c = tl.arange(0, KEPT_PAD)
    m_c = o_c < kept
    p_column = columns_ptr + 3 * (tl.load(p_head + 1) + o_c)
    channel = tl.load(p_column, mask=m_c, other=0)
    column = tl.load(p_column + 1, mask=m_c, other=0)
    width = tl.load(p_column + 2, mask=m_c, other=0)
    o_32 = tl.arange(0, 32)
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    for token in range(start, stop, step):
        source = page_of(p_window_table, token // 32, WINDOW_BLOCK).to(tl.int64)
        page = tl.load(p_archive_table + token // BLOCK).to(tl.int64)
        slot = token % BLOCK
        row = head * WINDOW_BLOCK + row_of(token // 32, WINDOW_BLOCK)
        p_source = window_ptr + source * stride_window_page + (row + o_32) * (2 * D)
        k = tl.load(p_source[:, None] + channel[None, :], mask=m_c[None, :], other=0.0)
        v = tl.load(p_source[None, :] + D + o_d[:, None], mask=m_d[:, None], other=0.0)
        if TILES.encode is not None:
            k, v = TILES.encode(k), TILES.encode(v)
        p_page = archive_ptr + page * stride_archive_page
        dtype: tl.constexpr = archive_ptr.dtype.element_ty
        p_k = p_page + column[None, :] + (slot + o_32)[:, None] * width[None, :]
        tl.store(p_k, k.to(dtype), mask=m_c[None, :])
        p_v = p_page + v_offset + o_d[:, None] * BLOCK + o_32[None, :]
        tl.store(p_v + slot, v.to(dtype), mask=m_d[:, None])

        # Tiles are read whole: slots that hold no token yet must not hold NaN.
        empty = tl.zeros([D_PAD, 32], dtype)
        if token + 32 == stop:
            for i in range(slot + 32, BLOCK, 32):
                tl.store(p_v + i, empty, mask=m_d[:, None])
        if token == SINK:
            for i in range(0, slot, 32):
                tl.store(p_v + i, empty, mask=m_d[:, None])
