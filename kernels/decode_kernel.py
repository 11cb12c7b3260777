"""The first launch of decode: what a program finds in its share of the tokens of one KV head."""

import triton
import triton.language as tl
from vllm_leank.kernels.common import BATCH_POINTERS, load_sink_scores, skip_archived
from vllm_leank.kernels.fold_columns import fold_window
from vllm_leank.kernels.pages import page_of, row_of, window_tile
from vllm_leank.kernels.shares import after_prompt as is_after_prompt
from vllm_leank.kernels.shares import cut, share


@triton.jit(
    do_not_specialize=[
        "archive_units", "split_units", "stride_window_table", "stride_archive_table",
        "stride_selected",
    ],
    do_not_specialize_on_alignment=BATCH_POINTERS,
)  # fmt: skip
def decode_kernel(
    q_ptr, output_ptr, partial_ptr, lse_ptr, sink_scores_ptr, window_ptr, archive_ptr, side_ptr,
    window_desc, d0, d1, d2, d3, d4, d5,
    window_table_ptr, archive_table_ptr, seq_lens_ptr, exact_until_ptr,
    work_ptr, order_ptr, numbers_ptr, scale_log2, archive_units, split_units,
    stride_q_token, stride_q_head, stride_o_token, stride_o_head,
    stride_window_page, stride_archive_page, stride_side,
    stride_window_table, stride_archive_table, stride_selected,
    VARIANTS: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, UNIT_TILE: tl.constexpr, DENSE_UNITS: tl.constexpr,
    WINDOW_COST: tl.constexpr, ROWS: tl.constexpr, ONE_WAVE: tl.constexpr, SELECTION: tl.constexpr,
    AFTER_PROMPT: tl.constexpr,
    TILES: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
    STAGES: tl.constexpr, WINDOW_STAGES: tl.constexpr, WINDOW_TILE: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Programs `[requests, programs of a request]`, by `Tables.work`. One whose head has no other
    writes its output; the others leave normalised outputs, fp32, at `partial_ptr` and logarithms,
    base 2, of their sums of weights at `lse_ptr`, for `combine_kernel`.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # Programs that run together do the same for many requests, so that they share instructions.
    i_req, i_work = tl.program_id(0), tl.program_id(1)
    p_work = work_ptr + 9 * i_work
    head = tl.load(p_work)
    split = tl.load(p_work + 1)
    splits = tl.load(p_work + 2)
    place = tl.load(p_work + 3)
    p_head = p_work + 4
    variant = tl.load(p_head)
    head_units = tl.load(p_head + 3)
    length, boundary, n_archive, n_dense, head_units, splits = share(
        seq_lens_ptr, exact_until_ptr, i_req, splits, head_units, archive_units, split_units,
        SINK, RECENT, H, DENSE_UNITS, WINDOW_COST, TILE, UNIT_TILE, ROWS, ONE_WAVE, SELECTION,
    )  # fmt: skip
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
        apart: tl.constexpr = ROWS > 0
        first, first_dense = cut(
            split, splits, n_archive, n_dense, head_units, DENSE_UNITS * WINDOW_COST, apart
        )  # fmt: skip
        last, last_dense = cut(
            split + 1, splits, n_archive, n_dense, head_units, DENSE_UNITS * WINDOW_COST, apart
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
                m_g, first, last, boundary, p_first + o_query * stride_q_head, o_query < G,
                scale_log2, head, p_head, variant, order_ptr, numbers_ptr, p_table, descs,
                archive_ptr, side_ptr, stride_archive_page, stride_side, p_partial,
                lse_ptr + i_partial * G,
                SINK, H, D, D_PAD, VARIANTS, TILE, BLOCK, TILES, TMA, STAGES,
                SELECTION is not None, ALIKE,
            )  # fmt: skip

        PARTS: tl.constexpr = 32 // WINDOW_TILE
        if first_dense < last_dense:
            q = tl.load(
                p_first + o_g[None, :] * stride_q_head + o_d[:, None],
                mask=m_g[None, :] & (o_d[:, None] < D), other=0.0,
            )  # [D_PAD, G_PAD]  # fmt: skip
            p_table = window_table_ptr + i_req.to(tl.int64) * stride_window_table
            full = tl.minimum(last_dense, n_dense - 1)
            # What the archive gave to the sum goes on in one of the rows.
            o_row = tl.arange(0, WINDOW_TILE)[:, None]
            l_rows = tl.where(o_row == 0, l[None, :], 0.0)
            next_page = page_of(p_table, skip_archived(first_dense, boundary, SINK), WINDOW_BLOCK)
            for i in tl.range(first_dense * PARTS, full * PARTS, num_stages=WINDOW_STAGES):
                page = next_page
                following = tl.minimum((i + 1) // PARTS, full - 1)
                next_page = page_of(p_table, skip_archived(following, boundary, SINK), WINDOW_BLOCK)
                first_row = row_of(skip_archived(i // PARTS, boundary, SINK), WINDOW_BLOCK)
                k, v = window_tile(
                    window_desc, window_ptr, page, head, first_row + i % PARTS * WINDOW_TILE,
                    stride_window_page, D, D_PAD, WINDOW_BLOCK, WINDOW_TILE, TMA,
                )  # fmt: skip
                m, l_rows, acc = fold_window(m, l_rows, acc, k, v, q, 0, scale_log2, False)
            if last_dense == n_dense:
                # The last granule may be partly unwritten: that must not reach the product.
                granule = skip_archived(n_dense - 1, boundary, SINK)
                page = page_of(p_table, granule, WINDOW_BLOCK)
                first_row = row_of(granule, WINDOW_BLOCK)
                for row in tl.range(0, (length - 1) % 32 + 1, WINDOW_TILE, num_stages=1):
                    k, v = window_tile(
                        window_desc, window_ptr, page, head, first_row + row,
                        stride_window_page, D, D_PAD, WINDOW_BLOCK, WINDOW_TILE, TMA,
                    )  # fmt: skip
                    written = row + o_row <= (length - 1) % 32
                    v = tl.where(written, v, 0.0)
                    m, l_rows, acc = fold_window(m, l_rows, acc, k, v, q, written, scale_log2, True)
            l = tl.sum(l_rows, 0)

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
