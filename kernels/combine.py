"""The second launch of decode: puts together what programs found of one head's tokens."""

import triton
import triton.language as tl
from vllm_leank.kernels.common import BATCH_POINTERS, load_sink_scores
from vllm_leank.kernels.shares import after_prompt, share, share_of_heads


@triton.jit(
    do_not_specialize=["programs", "archive_units", "split_units", "wave"],
    do_not_specialize_on_alignment=BATCH_POINTERS,
)
def combine_kernel(
    output_ptr, partial_ptr, lse_ptr, sink_scores_ptr, seq_lens_ptr, exact_until_ptr, work_ptr,
    heads_ptr, programs, archive_units, split_units, wave, stride_o_token, stride_o_head,
    SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr, UNIT_TILE: tl.constexpr,
    DENSE_UNITS: tl.constexpr, WINDOW_COST: tl.constexpr, ROWS: tl.constexpr,
    FEW: tl.constexpr, SELECTION: tl.constexpr,
    AFTER_PROMPT: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs `[requests, query heads, parts of PART channels]`: outputs that no program of the
    first launch has written already.
    """
    i_req, i_head = tl.program_id(0), tl.program_id(1)
    head, g = i_head // G, i_head % G
    if FEW:
        first = tl.load(heads_ptr + 3 * head)
        _, _, _, _, _, splits = share(
            seq_lens_ptr, exact_until_ptr, i_req, tl.load(heads_ptr + 3 * head + 1),
            tl.load(heads_ptr + 3 * head + 2), archive_units, split_units, wave, SINK, RECENT, H,
            DENSE_UNITS, WINDOW_COST, TILE, UNIT_TILE, ROWS, SELECTION,
        )  # fmt: skip
    else:
        _, _, _, _, o_head, _, of_heads, ends = share_of_heads(
            seq_lens_ptr, exact_until_ptr, i_req, programs, work_ptr, archive_units, split_units,
            wave, SINK, RECENT, H, DENSE_UNITS, WINDOW_COST, TILE, UNIT_TILE, ROWS, SELECTION,
        )  # fmt: skip
        mine = tl.load(work_ptr + 9 * o_head, mask=o_head < H, other=-1) == head
        splits = tl.sum(tl.where(mine, of_heads, 0), 0)
        first = tl.sum(tl.where(mine, ends - of_heads, 0), 0)
    if AFTER_PROMPT:
        splits = tl.where(after_prompt(seq_lens_ptr, exact_until_ptr, i_req), splits, 1)
    if PDL:
        tl.extra.cuda.gdc_wait()
    if splits != 1:
        o_d = tl.program_id(2) * PART + tl.arange(0, PART)
        m_d = o_d < D
        if sink_scores_ptr is None:
            m = -float("inf")
            l = 0.0
        else:  # one more partial result, of a token without V
            m = load_sink_scores(sink_scores_ptr, i_head, True)
            l = 1.0
        acc = tl.zeros([PART], tl.float32)
        for start in range(0, splits, SPLITS):
            o_split = start + tl.arange(0, SPLITS)
            m_split = o_split < splits
            o_row = ((i_req * programs + first).to(tl.int64) + o_split) * G + g
            lse = tl.load(lse_ptr + o_row, mask=m_split, other=float("-inf"))
            partial = tl.load(
                partial_ptr + o_row[:, None] * D + o_d[None, :],
                mask=m_split[:, None] & m_d[None, :], other=0.0,
            )  # [SPLITS, PART]  # fmt: skip
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
