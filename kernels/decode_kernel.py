"""The first launch of decode: what a program finds in its share of the tokens of one KV head."""

import triton
import triton.language as tl
from vllm_leank.kernels.common import BATCH_POINTERS, load_sink_scores
from vllm_leank.kernels.fold_columns import fold_granules
from vllm_leank.kernels.shares import after_prompt as is_after_prompt
from vllm_leank.kernels.shares import cut, share, share_of_heads


@triton.jit(
    do_not_specialize=[
        "archive_units", "split_units", "wave",
        "stride_window_table", "stride_archive_table", "stride_selected",
    ],
    do_not_specialize_on_alignment=BATCH_POINTERS,
)  # fmt: skip
def decode_kernel(
    q_ptr, output_ptr, partial_ptr, lse_ptr, sink_scores_ptr, window_ptr, archive_ptr, side_ptr,
    window_desc, d0, d1, d2, d3, d4, d5,
    window_table_ptr, archive_table_ptr, seq_lens_ptr, exact_until_ptr,
    work_ptr, order_ptr, numbers_ptr, scale_log2, archive_units, split_units, wave,
    stride_q_token, stride_q_head, stride_o_token, stride_o_head,
    stride_window_page, stride_archive_page, stride_side,
    stride_window_table, stride_archive_table, stride_selected,
    VARIANTS: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, UNIT_TILE: tl.constexpr, DENSE_UNITS: tl.constexpr,
    WINDOW_COST: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr, SELECTION: tl.constexpr,
    AFTER_PROMPT: tl.constexpr,
    TILES: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
    STAGES: tl.constexpr, WINDOW_STAGES: tl.constexpr, WINDOW_TILE: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Programs `[requests, programs of a request]`, by `Tables.work`; not FEW: those that have
    something to do come first. One whose head has no other writes its output; the others leave
    normalised outputs, fp32, at `partial_ptr` and logarithms, base 2, of their sums of weights at
    `lse_ptr`, for `combine_kernel`.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # Programs that run together do the same for many requests, so that they share instructions.
    i_req, i_work = tl.program_id(0), tl.program_id(1)
    if FEW:
        p_work = work_ptr + 9 * i_work
        split = tl.load(p_work + 1)
        place = tl.load(p_work + 3)
        length, boundary, n_archive, n_dense, head_units, splits = share(
            seq_lens_ptr, exact_until_ptr, i_req, tl.load(p_work + 2), tl.load(p_work + 7),
            archive_units, split_units, wave, SINK, RECENT, H, DENSE_UNITS, WINDOW_COST, TILE,
            UNIT_TILE, ROWS, SELECTION,
        )  # fmt: skip
    else:
        # While others read all that memory gives, each number that is not in the cache of a
        # multiprocessor comes late. So one that finds nothing to do asks for few, which others
        # have asked for as well: lengths, and a row for each head.
        length, boundary, n_archive, n_dense, o_row, units, of_rows, ends = share_of_heads(
            seq_lens_ptr, exact_until_ptr, i_req, tl.num_programs(1), work_ptr, archive_units,
            split_units, wave, SINK, RECENT, H, DENSE_UNITS, WINDOW_COST, TILE, UNIT_TILE, ROWS,
            SELECTION,
        )  # fmt: skip
        row = tl.sum((ends <= i_work).to(tl.int32), 0)
        mine = o_row == row
        split = i_work - tl.sum(tl.where(o_row < row, of_rows, 0), 0)
        splits = tl.sum(tl.where(mine, of_rows, 0), 0)
        head_units = tl.sum(tl.where(mine, units, 0), 0)
        n_archive = tl.where(head_units > 0, n_archive, 0)
        place = i_work
        # Behind the last row are programs that have nothing to do.
        p_work = work_ptr + 9 * tl.minimum(row, H - 1)
    head = tl.load(p_work)
    p_head = p_work + 4
    variant = tl.load(p_head)
    if AFTER_PROMPT:
        # Others are not for this launch.
        splits = tl.where(is_after_prompt(seq_lens_ptr, exact_until_ptr, i_req), splits, 0)
    if split < splits:
        i_partial = (i_req * tl.num_programs(1) + place).to(tl.int64)
        p_partial = partial_ptr + i_partial * (G * D)
        # Columns of products: each query has `ALIKE` of them, side by side.
        o_g = tl.arange(0, G_PAD) // ALIKE
        m_g = o_g < G
        o_query = tl.arange(0, G_PAD // ALIKE)
        o_d = tl.arange(0, D_PAD)
        p_first = q_ptr + i_req.to(tl.int64) * stride_q_token + head * G * stride_q_head
        m = tl.full([G_PAD], float("-inf"), tl.float32)
        l = tl.zeros([G_PAD], tl.float32)
        acc = tl.zeros([D_PAD, G_PAD], tl.float32)

        if PDL:
            # Lengths, tables and what is prepared once were there before the launch in front of
            # this one began. That one may have written what is read from here on: pages, and q.
            tl.extra.cuda.gdc_wait()
        # In one wave no program may take longer than the others: one that has come to its window
        # waits for instructions and pages. Where many waves follow each other nobody waits for it.
        first, first_dense = cut(
            split, splits, n_archive, n_dense, head_units, DENSE_UNITS * WINDOW_COST, FEW
        )  # fmt: skip
        last, last_dense = cut(
            split + 1, splits, n_archive, n_dense, head_units, DENSE_UNITS * WINDOW_COST, FEW
        )  # fmt: skip
        if first < last:
            p_table = archive_table_ptr + i_req.to(tl.int64) * stride_archive_table
            if SELECTION is None:
                first += SINK // TILE
                last += SINK // TILE
            else:
                p_table += head * stride_selected
            descs = (d0, d1, d2, d3, d4, d5)
            m, l, acc = TILES.fold_columns(
                first, last, boundary, p_first + o_query * stride_q_head, scale_log2,
                head, p_head, variant, order_ptr, numbers_ptr, p_table, descs,
                archive_ptr, side_ptr, stride_archive_page, stride_side, p_partial,
                lse_ptr + i_partial * G,
                SINK, H, G, G_PAD, D, D_PAD, VARIANTS, TILE, BLOCK, TILES, TMA, STAGES,
                SELECTION is not None, ALIKE,
            )  # fmt: skip

        if first_dense < last_dense:
            m, l, acc = fold_granules(
                m, l, acc, first_dense, last_dense, n_dense, length, boundary,
                p_first + o_g * stride_q_head, m_g, scale_log2, head,
                window_table_ptr + i_req.to(tl.int64) * stride_window_table,
                window_desc, window_ptr, stride_window_page,
                SINK, D, D_PAD, WINDOW_BLOCK, WINDOW_TILE, WINDOW_STAGES, TMA,
            )  # fmt: skip

        if splits == 1:
            if sink_scores_ptr is not None:
                l += tl.exp2(load_sink_scores(sink_scores_ptr, head * G + o_g, m_g) - m)
            p_output = output_ptr + i_req.to(tl.int64) * stride_o_token + head * G * stride_o_head
            tl.store(
                p_output + o_g[None, :] * stride_o_head + o_d[:, None],
                (acc * (1 / l)[None, :]).to(output_ptr.dtype.element_ty),
                mask=m_g[None, :] & (o_d[:, None] < D),
            )  # fmt: skip
        else:
            tl.store(
                p_partial + o_g[None, :] * D + o_d[:, None],
                acc * (1 / l)[None, :],
                mask=m_g[None, :] & (o_d[:, None] < D),
            )  # fmt: skip
            tl.store(lse_ptr + i_partial * G + o_g, m + tl.log2(l), mask=m_g)
