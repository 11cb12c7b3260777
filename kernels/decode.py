"""Decode attention: one query per request over its sink, archived and recent tokens. Programs each
take a share of the tokens of one KV head; a second launch combines their results.
"""

import math

import torch
import triton
import triton.language as tl
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.common import boundary_of, dense_pages, skip_archived
from vllm_leank.kernels.fold_columns import fold_window
from vllm_leank.kernels.launch import choose_decode
from vllm_leank.kernels.launcher import launch
from vllm_leank.kernels.pages import window_tile

LOG2_E = math.log2(math.e)


@triton.jit
def _span(length, exact_until, SINK: tl.constexpr, RECENT: tl.constexpr, TILE: tl.constexpr):
    """What the last query of requests reads: the boundary (`SINK` where all is dense), the number
    of dense pages, and that of archive tiles.
    """
    boundary = tl.where(length > exact_until, boundary_of(length, SINK, RECENT), SINK)
    n_dense = dense_pages(length, boundary, SINK)
    n_archive = tl.where(boundary > SINK, tl.cdiv(boundary, TILE) - SINK // TILE, 0)
    return boundary, n_dense, n_archive


@triton.jit
def _share(
    seq_lens_ptr, exact_until_ptr, i_req, splits, head_units, archive_units, split_units,
    SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    TILE: tl.constexpr, WINDOW_BYTES: tl.constexpr, ROWS: tl.constexpr,
    ONE_WAVE: tl.constexpr,
):  # fmt: skip
    """What one KV head of a request reads, and over how many of its programs: no more than give
    each `split_units` to read, and, in a batch of at most `ROWS` requests, together one wave.

    Units are 256 bytes; `head_units` are those of one tile of the head, `archive_units` of all
    heads.
    """
    DENSE_UNITS: tl.constexpr = 32 * 2 * D * WINDOW_BYTES // 256
    if ROWS > 0:
        o_row = tl.arange(0, ROWS)
        m_row = o_row < tl.num_programs(1)
        lengths = tl.load(seq_lens_ptr + o_row, mask=m_row, other=0)
        prompts = tl.load(exact_until_ptr + o_row, mask=m_row, other=0)
        _, n_dense, n_archive = _span(lengths, prompts, SINK, RECENT, TILE)
        total = tl.sum(n_dense * (H * DENSE_UNITS) + n_archive * archive_units, 0)
        split_units = tl.maximum(split_units, tl.cdiv(total, ONE_WAVE))
    length = tl.load(seq_lens_ptr + i_req)
    exact_until = tl.load(exact_until_ptr + i_req)
    boundary, n_dense, n_archive = _span(length, exact_until, SINK, RECENT, TILE)
    n_archive = tl.where(head_units > 0, n_archive, 0)
    units = n_dense * DENSE_UNITS + n_archive * head_units
    splits = tl.minimum(splits, tl.cdiv(units, split_units))
    # Each split has a tile; a padded row has no split.
    splits = tl.minimum(splits, tl.maximum(n_dense, n_archive))
    return length, boundary, n_dense, n_archive, splits


@triton.jit(
    do_not_specialize=[
        "archive_units",
        "split_units",
        "stride_window_table",
        "stride_archive_table",
    ]
)
def _decode_kernel(
    q_ptr, output_ptr, partial_ptr, lse_ptr, window_ptr, archive_ptr, side_ptr,
    window_desc, d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, d10,
    window_table_ptr, archive_table_ptr, seq_lens_ptr, exact_until_ptr,
    work_ptr, order_ptr, numbers_ptr, scale_log2, archive_units, split_units,
    stride_q_token, stride_q_head, stride_o_token, stride_o_head,
    stride_window_page, stride_archive_page, stride_side,
    stride_window_table, stride_archive_table,
    VARIANTS: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, WINDOW_BYTES: tl.constexpr,
    ROWS: tl.constexpr, ONE_WAVE: tl.constexpr,
    TILES: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
    STAGES: tl.constexpr, WINDOW_STAGES: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_work, i_req = tl.program_id(0), tl.program_id(1)
    p_work = work_ptr + 8 * i_work
    head = tl.load(p_work)
    split = tl.load(p_work + 1)
    splits = tl.load(p_work + 2)
    p_head = p_work + 3
    variant = tl.load(p_head)
    head_units = tl.load(p_head + 3)
    length, boundary, n_dense, n_archive, splits = _share(
        seq_lens_ptr, exact_until_ptr, i_req, splits, head_units, archive_units, split_units,
        SINK, RECENT, H, D, TILE, WINDOW_BYTES, ROWS, ONE_WAVE,
    )  # fmt: skip
    if split < splits:
        o_g = tl.arange(0, G_PAD)
        o_d = tl.arange(0, D_PAD)
        p_q = q_ptr + i_req.to(tl.int64) * stride_q_token + (head * G + o_g) * stride_q_head
        q = tl.load(
            p_q[None, :] + o_d[:, None], mask=(o_g[None, :] < G) & (o_d[:, None] < D), other=0.0
        )  # [D_PAD, G_PAD]
        m = tl.full([G_PAD], float("-inf"), tl.float32)
        l = tl.zeros([G_PAD], tl.float32)
        acc = tl.zeros([D_PAD, G_PAD], tl.float32)

        if PDL:
            # Lengths and tables were there before; from here on pages are read.
            tl.extra.cuda.gdc_wait()
        if n_archive > 0:
            first = SINK // TILE + n_archive * split // splits
            last = SINK // TILE + n_archive * (split + 1) // splits
            p_table = archive_table_ptr + i_req.to(tl.int64) * stride_archive_table
            descs = (d0, d1, d2, d3, d4, d5, d6, d7, d8, d9, d10)
            for c in tl.static_range(len(VARIANTS)):
                if variant == VARIANTS[c]:
                    m, l, acc = TILES.fold_columns(
                        m, l, acc, first, last, boundary, q, p_q, o_g < G, scale_log2,
                        head, p_head, order_ptr, numbers_ptr, p_table, descs, archive_ptr,
                        side_ptr, stride_archive_page, stride_side,
                        SINK, H, D, D_PAD, VARIANTS[c], TILE, BLOCK, TILES, TMA, STAGES,
                    )  # fmt: skip

        first = n_dense * split // splits
        last = n_dense * (split + 1) // splits
        p_table = window_table_ptr + i_req.to(tl.int64) * stride_window_table
        full = tl.minimum(last, n_dense - 1)
        # What the archive gave to the sum goes on in one of the rows.
        l_rows = tl.where(tl.arange(0, 32)[:, None] == 0, l[None, :], 0.0)
        next_page = tl.load(p_table + skip_archived(first, boundary, SINK))
        for i in tl.range(first, full, num_stages=WINDOW_STAGES):
            page = next_page
            following = tl.minimum(i + 1, full - 1)
            next_page = tl.load(p_table + skip_archived(following, boundary, SINK))
            k, v = window_tile(window_desc, window_ptr, page, head, stride_window_page, D, D_PAD,
                               TMA)  # fmt: skip
            m, l_rows, acc = fold_window(m, l_rows, acc, k, v, q, 0, scale_log2, False)
        if last == n_dense:
            # The last page may be partly unwritten: what is there must not reach the product.
            page = tl.load(p_table + skip_archived(n_dense - 1, boundary, SINK))
            k, v = window_tile(window_desc, window_ptr, page, head, stride_window_page, D, D_PAD,
                               TMA)  # fmt: skip
            written = (tl.arange(0, 32) <= (length - 1) % 32)[:, None]
            v = tl.where(written, v, 0.0)
            m, l_rows, acc = fold_window(m, l_rows, acc, k, v, q, written, scale_log2, True)

        l = tl.sum(l_rows, 0)
        if splits == 1:
            p_output = output_ptr + i_req.to(tl.int64) * stride_o_token + head * G * stride_o_head
            tl.store(
                p_output + o_g[None, :] * stride_o_head + o_d[:, None],
                (acc / l[None, :]).to(output_ptr.dtype.element_ty),
                mask=(o_g[None, :] < G) & (o_d[:, None] < D),
            )  # fmt: skip
        else:
            i_partial = (i_req * tl.num_programs(0) + i_work).to(tl.int64)
            tl.store(
                partial_ptr + i_partial * (G * D) + o_g[None, :] * D + o_d[:, None],
                acc / l[None, :],
                mask=(o_g[None, :] < G) & (o_d[:, None] < D),
            )  # fmt: skip
            tl.store(lse_ptr + i_partial * G + o_g, m + tl.log2(l), mask=o_g < G)


@triton.jit(do_not_specialize=["programs", "archive_units", "split_units"])
def _combine_kernel(
    output_ptr, partial_ptr, lse_ptr, seq_lens_ptr, exact_until_ptr, heads_ptr,
    programs, archive_units, split_units, stride_o_token, stride_o_head,
    SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, WINDOW_BYTES: tl.constexpr,
    ROWS: tl.constexpr, ONE_WAVE: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i_head, i_req = tl.program_id(0), tl.program_id(1)
    head, g = i_head // G, i_head % G
    first = tl.load(heads_ptr + 3 * head)
    splits = tl.load(heads_ptr + 3 * head + 1)
    head_units = tl.load(heads_ptr + 3 * head + 2)
    _, _, _, _, splits = _share(
        seq_lens_ptr, exact_until_ptr, i_req, splits, head_units, archive_units, split_units,
        SINK, RECENT, H, D, TILE, WINDOW_BYTES, ROWS, ONE_WAVE,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    if splits != 1:
        o_d = tl.arange(0, D_PAD)
        m_d = o_d < D
        m = -float("inf")
        l = 0.0
        acc = tl.zeros([D_PAD], tl.float32)
        for start in range(0, splits, SPLITS):
            o_split = start + tl.arange(0, SPLITS)
            m_split = o_split < splits
            o_row = ((i_req * programs + first).to(tl.int64) + o_split) * G + g
            lse = tl.load(lse_ptr + o_row, mask=m_split, other=float("-inf"))
            partial = tl.load(
                partial_ptr + o_row[:, None] * D + o_d[None, :],
                mask=m_split[:, None] & m_d[None, :], other=0.0,
            )  # [SPLITS, D_PAD]  # fmt: skip
            m_new = tl.maximum(m, tl.max(lse, 0))
            alpha = tl.exp2(m - m_new)
            weight = tl.exp2(lse - m_new)
            acc = acc * alpha + tl.sum(weight[:, None] * partial, 0)
            l = l * alpha + tl.sum(weight, 0)
            m = m_new
        # A padded row has no split, and gets zeros.
        acc = acc / tl.where(splits > 0, l, 1.0)
        p_output = output_ptr + i_req.to(tl.int64) * stride_o_token + i_head * stride_o_head
        tl.store(p_output + o_d, acc.to(output_ptr.dtype.element_ty), mask=m_d)


def decode(
    query: torch.Tensor, output: torch.Tensor, cache: LayerCache, batch: Batch, scale: float
) -> None:
    """Attention of one query per request; see `reference.attend`.

    Args:
        query: `[num_reqs, num_heads, head_dim]`, after RoPE; row i is the last token of request i.
        output: like `query`; rows of padded requests (length 0) are set to zero.
        cache: the layer's pages.
        batch: the step's requests.
        scale: factor of the QK product.
    """
    layout, window, tables = cache.layout, cache.window, cache.tables
    num_reqs, num_heads, head_dim = query.shape
    num_kv_heads = len(layout.profiles)
    group = num_heads // num_kv_heads
    shape = choose_decode(num_reqs, layout, tables.device)
    work = tables.work(shape.programs)
    partial = query.new_empty((num_reqs, shape.programs, group, head_dim), dtype=torch.float32)
    lse = query.new_empty((num_reqs, shape.programs, group), dtype=torch.float32)
    archive, side = cache.archive_pages, cache.side
    shared = {
        "SINK": window.sink,
        "RECENT": window.recent,
        "H": num_kv_heads,
        "G": group,
        "D": head_dim,
        "D_PAD": triton.next_power_of_2(head_dim),
        "TILE": shape.tile,
        "WINDOW_BYTES": layout.itemsize,
        "ROWS": shape.rows,
        "ONE_WAVE": shape.wave,
        "PDL": shape.tma,
        "launch_pdl": shape.tma,
    }
    launch(
        _decode_kernel, (shape.programs, num_reqs),
        query, output, partial, lse, cache.window_pages, archive, side,
        *cache.descriptor_arguments(shape.tile, shape.tma),
        batch.window_table, batch.archive_table, batch.seq_lens, batch.exact_until,
        work.programs, tables.order, tables.numbers, scale * LOG2_E, tables.archive_units,
        shape.split_bytes // 256,
        query.stride(0), query.stride(1), output.stride(0), output.stride(1),
        cache.window_pages.stride(0), archive.stride(0), side.stride(0),
        batch.window_table.stride(0), batch.archive_table.stride(0),
        **shared,
        VARIANTS=tables.variants,
        G_PAD=max(triton.next_power_of_2(group), 8),
        BLOCK=layout.archive_block,
        TILES=cache.codec.tiles,
        TMA=shape.tma,
        STAGES=shape.stages,
        WINDOW_STAGES=shape.window_stages,
        num_warps=shape.warps,
        maxnreg=shape.registers,
    )  # fmt: skip
    launch(
        _combine_kernel, (num_heads, num_reqs),
        output, partial, lse, batch.seq_lens, batch.exact_until, work.heads,
        shape.programs, tables.archive_units, shape.split_bytes // 256,
        output.stride(0), output.stride(1),
        **shared,
        SPLITS=shape.combined,
        num_warps=4,
    )  # fmt: skip
