"""Decode attention: one query per request over its sink, archived and recent tokens. Programs each
take a share of the tokens of one KV head; the last to finish combines the results.
"""

import math

import torch
import triton
import triton.language as tl
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.common import boundary_of, skip_archived
from vllm_leank.kernels.launch import choose_decode
from vllm_leank.kernels.pages import fold_archive, fold_window, window_tile

LOG2_E = math.log2(math.e)


@triton.jit
def _decode_span(
    seq_lens_ptr, exact_until_ptr, i_req, kept,
    SINK: tl.constexpr, RECENT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What the query of a request reads: its length, the boundary (`SINK` where all is dense), the
    number of dense pages, the first archive tile and their number."""
    length = tl.load(seq_lens_ptr + i_req)
    exact_until = tl.load(exact_until_ptr + i_req)
    boundary = tl.where(length > exact_until, boundary_of(length, SINK, RECENT), SINK)
    n_dense = tl.cdiv(length - (boundary - SINK), 32)
    n_archive = tl.where(
        (kept > 0) & (boundary > SINK), tl.cdiv(boundary, TILE) - SINK // TILE, 0
    )
    return length, boundary, n_dense, n_archive


@triton.jit
def _used_splits(
    splits, split_bytes, kept, n_dense, n_archive,
    D: tl.constexpr, TILE: tl.constexpr, WINDOW_BYTES: tl.constexpr,
    ARCHIVE_BYTES: tl.constexpr,
):  # fmt: skip
    """How many of a head's programs get work: a short request would only pay for more, and a
    padded row has none."""
    # In units of 256 bytes, so that no length overflows 32 bits.
    units = n_dense * (32 * 2 * D * WINDOW_BYTES // 256)
    units += n_archive * ((kept + D) * (TILE * ARCHIVE_BYTES // 16) // 16)
    return tl.minimum(tl.cdiv(units, split_bytes // 256), splits)


@triton.jit
def _combine(
    p_output, p_partial, p_lse, splits, stride_o_head,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Combine the splits of one request and KV head."""
    CHUNK: tl.constexpr = 8192 // (G_PAD * D_PAD)
    o_g = tl.arange(0, G_PAD)
    o_d = tl.arange(0, D_PAD)
    m_g = o_g < G
    m_gd = m_g[:, None] & (o_d < D)[None, :]
    o_gd = o_g[:, None] * D + o_d[None, :]
    m = tl.full([G_PAD], float("-inf"), tl.float32)
    l = tl.zeros([G_PAD], tl.float32)
    acc = tl.zeros([G_PAD, D_PAD], tl.float32)
    for start in range(0, splits, CHUNK):
        o_s = start + tl.arange(0, CHUNK)
        m_s = o_s < splits
        lse = tl.load(
            p_lse + o_s[:, None] * G + o_g[None, :], mask=m_s[:, None] & m_g[None, :],
            other=float("-inf"), cache_modifier=".cg",
        )  # [CHUNK, G_PAD]  # fmt: skip
        lse = tl.where(m_g[None, :], lse, 0.0)
        partial = tl.load(
            p_partial + o_s[:, None, None] * (G * D) + o_gd[None, :, :],
            mask=m_s[:, None, None] & m_gd[None, :, :], other=0.0, cache_modifier=".cg",
        )  # [CHUNK, G_PAD, D_PAD]  # fmt: skip
        m_new = tl.maximum(m, tl.max(lse, 0))
        alpha = tl.exp2(m - m_new)
        weight = tl.exp2(lse - m_new[None, :])
        l = l * alpha + tl.sum(weight, 0)
        acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * partial, 0)
        m = m_new
    out = (acc / l[:, None]).to(p_output.dtype.element_ty)
    tl.store(p_output + o_g[:, None] * stride_o_head + o_d[None, :], out, mask=m_gd)


@triton.jit(do_not_specialize=["split_bytes"])
def _decode_kernel(
    q_ptr, output_ptr, partial_ptr, lse_ptr, arrived_ptr, window_ptr, archive_ptr, scales_ptr,
    window_desc, v_desc, k16, k32, k64, k128, k256,
    window_table_ptr, archive_table_ptr, seq_lens_ptr, exact_until_ptr,
    heads_ptr, work_ptr, channels_ptr, scale_log2, split_bytes,
    stride_q_token, stride_q_head, stride_o_token, stride_o_head,
    stride_window_page, stride_archive_page, stride_scales,
    stride_window_table, stride_archive_table,
    COUNTS: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, WINDOW_BYTES: tl.constexpr, ARCHIVE_BYTES: tl.constexpr,
    FP8: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_work, i_req = tl.program_id(0), tl.program_id(1)
    head = tl.load(work_ptr + 3 * i_work)
    split = tl.load(work_ptr + 3 * i_work + 1)
    splits = tl.load(work_ptr + 3 * i_work + 2)
    p_head = heads_ptr + 5 * head
    kept = tl.load(p_head)
    length, boundary, n_dense, n_archive = _decode_span(
        seq_lens_ptr, exact_until_ptr, i_req, kept, SINK, RECENT, TILE
    )
    splits = _used_splits(
        splits, split_bytes, kept, n_dense, n_archive, D, TILE, WINDOW_BYTES, ARCHIVE_BYTES
    )
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

        if n_archive > 0:
            first = SINK // TILE + n_archive * split // splits
            last = SINK // TILE + n_archive * (split + 1) // splits
            p_table = archive_table_ptr + i_req.to(tl.int64) * stride_archive_table
            for c in tl.static_range(len(COUNTS)):
                if kept == COUNTS[c]:
                    m, l, acc = fold_archive(
                        m, l, acc, first, last, boundary, boundary, q, p_q, o_g < G, scale_log2,
                        p_head, channels_ptr, p_table, k16, k32, k64, k128, k256, v_desc,
                        archive_ptr, scales_ptr, stride_archive_page, stride_scales,
                        SINK, D, D_PAD, COUNTS[c], TILE, BLOCK, FP8, TMA, False, STAGES,
                    )  # fmt: skip

        first = n_dense * split // splits
        last = n_dense * (split + 1) // splits
        p_table = window_table_ptr + i_req.to(tl.int64) * stride_window_table
        full = tl.minimum(last, n_dense - 1)
        next_page = tl.load(p_table + skip_archived(first, boundary, SINK))
        for i in tl.range(first, full, num_stages=STAGES):
            page = next_page
            next_page = tl.load(p_table + skip_archived(tl.minimum(i + 1, full - 1), boundary, SINK))
            k, v = window_tile(window_desc, window_ptr, page, head, stride_window_page, D, D_PAD,
                               TMA)  # fmt: skip
            m, l, acc = fold_window(m, l, acc, k, v, q, 0, scale_log2, False, False)
        if last == n_dense:
            # The last page may be partly unwritten: what is there must not reach the product.
            page = tl.load(p_table + skip_archived(n_dense - 1, boundary, SINK))
            k, v = window_tile(window_desc, window_ptr, page, head, stride_window_page, D, D_PAD,
                               TMA)  # fmt: skip
            written = (tl.arange(0, 32) <= (length - 1) % 32)[:, None]
            v = tl.where(written, v, 0.0)
            m, l, acc = fold_window(m, l, acc, k, v, q, written, scale_log2, True, False)

        p_output = output_ptr + i_req.to(tl.int64) * stride_o_token + head * G * stride_o_head
        if splits == 1:
            tl.store(
                p_output + o_g[None, :] * stride_o_head + o_d[:, None],
                (acc / l[None, :]).to(output_ptr.dtype.element_ty),
                mask=(o_g[None, :] < G) & (o_d[:, None] < D),
            )  # fmt: skip
        else:
            # A split may be left without tokens.
            lse = tl.where(l > 0, m + tl.log2(l), float("-inf"))
            acc = acc / tl.where(l > 0, l, 1.0)[None, :]
            first_row = (i_req * tl.num_programs(0) + i_work - split).to(tl.int64)
            p_partial = partial_ptr + (first_row + split) * (G * D)
            tl.store(
                p_partial + o_g[None, :] * D + o_d[:, None], acc,
                mask=(o_g[None, :] < G) & (o_d[:, None] < D),
            )  # fmt: skip
            tl.store(lse_ptr + (first_row + split) * G + o_g, lse, mask=o_g < G)
            # Who comes last combines. The order of the sum is fixed, whoever that is.
            tl.debug_barrier()
            p_arrived = arrived_ptr + i_req * H + head
            if tl.atomic_add(p_arrived, 1, sem="acq_rel") == splits - 1:
                tl.store(p_arrived, 0)
                _combine(
                    p_output, partial_ptr + first_row * (G * D), lse_ptr + first_row * G, splits,
                    stride_o_head, G, G_PAD, D, D_PAD,
                )  # fmt: skip
    if (n_dense == 0) & (split == 0):
        o_g = tl.arange(0, G_PAD)[:, None]
        o_d = tl.arange(0, D_PAD)[None, :]
        p_output = output_ptr + i_req.to(tl.int64) * stride_o_token + head * G * stride_o_head
        nothing = tl.zeros([G_PAD, D_PAD], output_ptr.dtype.element_ty)
        tl.store(p_output + o_g * stride_o_head + o_d, nothing, mask=(o_g < G) & (o_d < D))


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
    num_kv_heads = len(layout.kept)
    group = num_heads // num_kv_heads
    launch = choose_decode(num_reqs, layout, tables.device)
    work = tables.work(launch.programs)
    partial = query.new_empty((num_reqs, launch.programs, group, head_dim), dtype=torch.float32)
    lse = query.new_empty((num_reqs, launch.programs, group), dtype=torch.float32)
    archive = cache.archive_pages
    scales = cache.scales
    _decode_kernel[(launch.programs, num_reqs)](
        query, output, partial, lse, tables.arrived(num_reqs),
        cache.window_pages, archive, scales,
        *(cache.descriptors.arguments if launch.tma else (archive,) * 7),
        batch.window_table, batch.archive_table, batch.seq_lens, batch.exact_until,
        tables.heads, work, tables.channels, scale * LOG2_E, launch.split_bytes,
        query.stride(0), query.stride(1), output.stride(0), output.stride(1),
        cache.window_pages.stride(0), archive.stride(0), scales.stride(0),
        batch.window_table.stride(0), batch.archive_table.stride(0),
        COUNTS=tables.counts,
        SINK=window.sink,
        RECENT=window.recent,
        H=num_kv_heads,
        G=group,
        G_PAD=max(triton.next_power_of_2(group), 8),
        D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim),
        BLOCK=layout.archive_block,
        TILE=launch.tile,
        WINDOW_BYTES=layout.itemsize,
        ARCHIVE_BYTES=layout.archive_itemsize,
        FP8=layout.is_fp8,
        TMA=launch.tma,
        STAGES=launch.stages,
        num_warps=launch.warps,
    )  # fmt: skip
