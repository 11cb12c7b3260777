"""Attention of many queries per request over dense and archived tokens: prompts that are read
pruned, outputs that are computed again after a preemption, and whatever else comes after a prompt
in many tokens.

Each query has a boundary of its own: a token may be dense for one and archived for the next. What
pieces of queries have found in far tokens that all of them see (`pieces`) is taken in at the end.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.common import (
    BATCH_POINTERS,
    LOG2_E,
    boundary_of,
    dense_granules,
    load_sink_scores,
    skip_archived,
)
from vllm_leank.kernels.fold_rows import fold_window
from vllm_leank.kernels.launch import choose_extend
from vllm_leank.kernels.launcher import Launch
from vllm_leank.kernels.merge import take_in
from vllm_leank.kernels.pages import page_of, row_of, window_tile

from vllm_leank.core.window import GRANULE


@triton.jit(
    do_not_specialize=["stride_window_table", "stride_archive_table", "stride_lse"],
    do_not_specialize_on_alignment=BATCH_POINTERS,
)
def _extend_kernel(
    q_ptr, output_ptr, written_ptr, lse_ptr, sink_scores_ptr, window_ptr, archive_ptr, side_ptr,
    window_desc, d0, d1, d2, d3, d4, d5,
    window_table_ptr, archive_table_ptr, query_start_ptr, seq_lens_ptr, exact_until_ptr,
    heads_ptr, order_ptr, numbers_ptr, scale_log2,
    stride_q_token, stride_q_head, stride_o_token, stride_o_head,
    stride_window_page, stride_archive_page, stride_side,
    stride_window_table, stride_archive_table, stride_lse,
    VARIANTS: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, PIECE: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = M // G
    # The last queries, which read most, first.
    i_block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, i_req = tl.program_id(1), tl.program_id(2)
    start = tl.load(query_start_ptr + i_req)
    num_queries = tl.load(query_start_ptr + i_req + 1) - start
    after = tl.load(seq_lens_ptr + i_req)
    exact_until = tl.load(exact_until_ptr + i_req)
    before = after - num_queries
    # Positions of the first and the last query that this program has to do.
    oldest = tl.maximum(before + i_block * QUERIES, exact_until)
    newest = tl.minimum(before + (i_block + 1) * QUERIES, after) - 1
    if oldest <= newest:
        o_m = tl.arange(0, M)
        o_d = tl.arange(0, D_PAD)
        position = before + i_block * QUERIES + o_m // G
        m_m = (o_m < QUERIES * G) & (position >= oldest) & (position <= newest)
        row = (start + i_block * QUERIES + o_m // G).to(tl.int64)
        p_q = q_ptr + row * stride_q_token + (head * G + o_m % G) * stride_q_head
        m_md = m_m[:, None] & (o_d < D)[None, :]
        q = tl.load(p_q[:, None] + o_d[None, :], mask=m_md, other=0.0)  # [M, D_PAD]
        m = tl.full([M], float("-inf"), tl.float32)
        l = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D_PAD], tl.float32)
        boundary = boundary_of(position + 1, SINK, RECENT)
        # What is archived for the oldest query is archived for all.
        first_boundary = boundary_of(oldest + 1, SINK, RECENT)

        p_head = heads_ptr + 5 * head
        variant = tl.load(p_head)
        stop = boundary_of(newest + 1, SINK, RECENT)
        if lse_ptr is None:
            begin = SINK
        else:  # a piece holds whole programs
            piece = before + i_block * QUERIES // PIECE * PIECE
            begin = boundary_of(piece + 1, SINK, RECENT)
        if (variant > 0) & (stop > begin):
            p_written = written_ptr
            if written_ptr is not None:
                p_written += ((start + i_block * QUERIES).to(tl.int64) * H + head) * (G * D)
            m, l, acc = TILES.fold_rows(
                m, l, acc, begin, first_boundary, stop, boundary, p_q, m_m, scale_log2,
                head, p_head, variant, order_ptr, numbers_ptr,
                archive_table_ptr + i_req.to(tl.int64) * stride_archive_table,
                (d0, d1, d2, d3, d4, d5), archive_ptr, side_ptr, stride_archive_page, stride_side,
                p_written, o_m // G * (H * G * D) + o_m % G * D,
                SINK, H, D, D_PAD, VARIANTS, TILE, BLOCK, TILES, TMA, STAGES,
            )  # fmt: skip

        p_table = window_table_ptr + i_req.to(tl.int64) * stride_window_table
        o_token = tl.arange(0, 32)
        n_dense = dense_granules(newest + 1, first_boundary, SINK)
        next_page = page_of(p_table, skip_archived(0, first_boundary, SINK), WINDOW_BLOCK)
        for i in tl.range(n_dense, num_stages=STAGES):
            granule = skip_archived(i, first_boundary, SINK)
            token = granule * 32 + o_token
            page = next_page
            following = skip_archived(tl.minimum(i + 1, n_dense - 1), first_boundary, SINK)
            next_page = page_of(p_table, following, WINDOW_BLOCK)
            k, v = window_tile(
                window_desc, window_ptr, page, head, row_of(granule, WINDOW_BLOCK),
                stride_window_page, D, D_PAD, WINDOW_BLOCK, 32, TMA,
            )  # fmt: skip
            v = tl.where((token <= newest)[:, None], v, 0.0)
            seen = token[None, :] <= position[:, None]
            seen &= (token < SINK)[None, :] | (token[None, :] >= boundary[:, None])
            m, l, acc = fold_window(m, l, acc, k, v, q, seen, scale_log2)

        p_output = output_ptr + row * stride_o_token + (head * G + o_m % G) * stride_o_head
        if lse_ptr is not None:
            p_lse = lse_ptr + (head * G + o_m % G).to(tl.int64) * stride_lse
            p_lse += row - tl.load(query_start_ptr)
            lse = tl.load(p_lse, mask=m_m, other=float("-inf")) * LOG2_E
            # What was computed of blind heads comes from pages that nothing was unpacked to.
            lse = tl.where(variant > 0, lse, float("-inf"))
            m, l, acc = take_in(m, l, acc, lse, p_output[:, None] + o_d[None, :], m_md)
        if sink_scores_ptr is not None:
            l += tl.exp2(load_sink_scores(sink_scores_ptr, head * G + o_m % G, m_m) - m)
        acc = (acc / l[:, None]).to(output_ptr.dtype.element_ty)
        tl.store(p_output[:, None] + o_d[None, :], acc, mask=m_md)


def extend(
    query: torch.Tensor,
    output: torch.Tensor,
    cache: LayerCache,
    batch: Batch,
    scale: float,
    lse: torch.Tensor | None = None,
) -> None:
    """Attention of the queries after each request's prompt; see `reference.attend`. Rows of prompt
    tokens are left as they are.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, after RoPE.
        output: like `query`.
        cache: the layer's pages.
        batch: the step's requests.
        scale: factor of the QK product.
        lse: fp32 `[num_heads, num_tokens]`, where `output` already has the attention to the far
            tokens that all queries of a piece of `piece_queries` see: the log-sum-exp of their
            scores, in the rows of the batch's own queries. What it says of blind heads is not read.
            None: nothing is known yet.
    """
    queries, launch = cache.prepared(
        _prepare, query.shape[1:], query.stride(), output.stride(), batch.table_strides, scale,
        lse is not None,
    )  # fmt: skip
    blocks = triton.cdiv(batch.max_query_len, queries)
    written = []
    if not cache.codec.whole_channels:
        written = [torch.empty(query.shape, dtype=torch.float16, device=query.device)]
    launch(
        (blocks, len(cache.layout.profiles), batch.num_reqs),
        query, output, batch.window_table, batch.archive_table, batch.query_start_loc,
        batch.seq_lens, batch.exact_until, *written,
        *(() if lse is None else (lse, lse.stride(0))),
    )  # fmt: skip


def piece_queries(cache: LayerCache, query_heads: int) -> int:
    """Queries of a piece, which read the same far tokens before `extend` reads the rest."""
    group = query_heads // len(cache.layout.profiles)
    return choose_extend(group, cache.layout, cache.tables.device).piece(group)


def _prepare(
    cache: LayerCache,
    heads: tuple[int, int],
    query_strides: tuple[int, ...],
    output_strides: tuple[int, ...],
    table_strides: tuple[int, int],
    scale: float,
    has_lse: bool,
) -> tuple[int, Launch]:
    """The launch of a layer, and the queries that a program takes."""
    layout, window, tables = cache.layout, cache.window, cache.tables
    num_heads, head_dim = heads
    num_kv_heads = len(layout.profiles)
    group = num_heads // num_kv_heads
    shape = choose_extend(group, layout, tables.device)
    changing = [
        "q_ptr", "output_ptr", "window_table_ptr", "archive_table_ptr", "query_start_ptr",
        "seq_lens_ptr", "exact_until_ptr",
    ]  # fmt: skip
    absent: dict[str, Any] = {}
    if cache.codec.whole_channels:
        absent |= {"written_ptr": None}
    else:
        changing += ["written_ptr"]
    if has_lse:
        changing += ["lse_ptr", "stride_lse"]
    else:
        absent |= {"lse_ptr": None, "stride_lse": 0}
    launch = Launch(
        _extend_kernel,
        changing,
        **absent,
        **cache.descriptor_arguments(shape.tile, GRANULE, shape.tma),
        sink_scores_ptr=cache.sink_scores,
        window_ptr=cache.window_pages,
        archive_ptr=cache.archive_pages,
        side_ptr=cache.side,
        heads_ptr=tables.heads,
        order_ptr=tables.order,
        numbers_ptr=tables.numbers,
        scale_log2=scale * LOG2_E.value,
        stride_q_token=query_strides[0],
        stride_q_head=query_strides[1],
        stride_o_token=output_strides[0],
        stride_o_head=output_strides[1],
        stride_window_page=cache.window_pages.stride(0),
        stride_archive_page=cache.archive_pages.stride(0),
        stride_side=cache.side.stride(0),
        stride_window_table=table_strides[0],
        stride_archive_table=table_strides[1],
        VARIANTS=tables.variants,
        SINK=window.sink,
        RECENT=window.recent,
        PIECE=shape.piece(group) if has_lse else 0,
        H=num_kv_heads,
        G=group,
        M=shape.rows,
        D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim),
        BLOCK=layout.archive_block,
        TILE=shape.tile,
        TILES=cache.codec.tiles,
        TMA=shape.tma,
        STAGES=shape.stages,
        WINDOW_BLOCK=layout.window_block,
        num_warps=shape.warps,
    )
    return shape.rows // group, launch
