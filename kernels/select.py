"""Selects the segments of far tokens that a query reads, by the summaries of their K.

Two launches: one scores all segments, over many programs, and one picks the best of each head.
"""

import torch
import triton
import triton.language as tl
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.codes import first_channel, summary_channels, summary_place
from vllm_leank.kernels.common import BATCH_POINTERS, boundary_of
from vllm_leank.kernels.launcher import Launch
from vllm_leank.kernels.shares import selected

from vllm_leank.core.formats.packed import MEAN_STEP, STEPS, VARIANCE_STEP
from vllm_leank.core.selection import SEGMENT, Selection

AT_ONCE = 64
"""Segments that a program scores."""

MEAN = tl.constexpr(tuple(MEAN_STEP / STEPS[bits] for bits in (8, 4, 2)))
"""From the distance of a class's codes to that of means in a summary."""

VARIANCE = tl.constexpr(tuple(VARIANCE_STEP / 2 / STEPS[bits] ** 2 for bits in (8, 4, 2)))
"""From the square of that distance to half of that of variances in a summary."""

PARAMETERS = [
    "q_ptr", "scores_ptr", "selected_ptr", *BATCH_POINTERS,
]  # fmt: skip


@triton.jit
def _far_segments(
    seq_lens_ptr, exact_until_ptr, i_req, SINK: tl.constexpr, RECENT: tl.constexpr
):  # fmt: skip
    """The boundary of a request's last query, and how many segments it may read."""
    length = tl.load(seq_lens_ptr + i_req)
    boundary = boundary_of(length, SINK, RECENT)
    boundary = tl.where(length > tl.load(exact_until_ptr + i_req), boundary, SINK)
    return boundary, tl.where(boundary > SINK, tl.cdiv(boundary, 64) - SINK // 64, 0)


@triton.jit
def _class_numbers(channel, numbers, VARIANT: tl.constexpr):
    """The number of each channel's class, by where channels stand in stored order."""
    found = tl.where(channel < first_channel(VARIANT, 2), numbers[1], numbers[2])
    return tl.where(channel < first_channel(VARIANT, 1), numbers[0], found)


@triton.jit
def _score(
    p_q, p_scores, first, segments, boundary, scale, head, p_head, archive_ptr, p_table, order_ptr,
    numbers_ptr, stride_q_head, stride_archive_page,
    VARIANT: tl.constexpr, SINK: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Scores of segments `first` to `first + AT_ONCE`, counted from the sink's."""
    C: tl.constexpr = summary_channels(VARIANT)
    o_c = tl.arange(0, C)
    channel = tl.load(order_ptr + head * D + o_c)
    factor = tl.load(numbers_ptr + (H + head) * D + o_c) * scale
    total = tl.zeros([C], tl.float32)
    squares = tl.zeros([C], tl.float32)
    for g in tl.static_range(G):
        q = tl.load(p_q + g * stride_q_head + channel).to(tl.float32) * factor
        total += q
        squares += q * q
    total *= _class_numbers(o_c, MEAN, VARIANT)
    squares *= _class_numbers(o_c, VARIANCE, VARIANT)

    o_g = (SINK // 64 + first) * 2 + tl.arange(0, 2 * AT_ONCE)
    token = o_g * 32
    m_g = (token >= SINK) & (token < boundary)
    page = tl.load(p_table + token // BLOCK, mask=m_g, other=0).to(tl.int64)
    place = summary_place(tl.load(p_head + 4), token % BLOCK, VARIANT, BLOCK)
    p_summary = archive_ptr + page * stride_archive_page + place
    x = tl.load(p_summary[:, None] + o_c[None, :], mask=m_g[:, None], other=0).to(tl.int32)
    score = (x & 15).to(tl.float32) * total[None, :] + (x >> 4).to(tl.float32) * squares[None, :]
    score = tl.where(m_g, tl.sum(score, 1), float("-inf"))
    score = tl.max(tl.reshape(score, (AT_ONCE, 2)), 1)
    o_s = first + tl.arange(0, AT_ONCE)
    tl.store(p_scores + o_s, score, mask=o_s < segments)


@triton.jit(
    do_not_specialize=["stride_archive_table", "stride_scores"],
    do_not_specialize_on_alignment=PARAMETERS,
)
def _score_kernel(
    q_ptr, scores_ptr, archive_ptr, archive_table_ptr, seq_lens_ptr, exact_until_ptr,
    heads_ptr, order_ptr, numbers_ptr, scale, stride_q_token, stride_q_head,
    stride_archive_page, stride_archive_table, stride_scores,
    VARIANTS: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SELECTION: tl.constexpr,
    AT_ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Scores of `AT_ONCE` segments of a request and KV head."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_req, head, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * AT_ONCE
    boundary, segments = _far_segments(seq_lens_ptr, exact_until_ptr, i_req, SINK, RECENT)
    if PDL:
        # By all programs: whoever waits for this launch then waits for those before it as well.
        tl.extra.cuda.gdc_wait()
    if (first < segments) & (segments > selected(segments, SELECTION)):
        p_head = heads_ptr + 5 * head
        variant = tl.load(p_head)
        p_table = archive_table_ptr + i_req.to(tl.int64) * stride_archive_table
        p_q = q_ptr + i_req.to(tl.int64) * stride_q_token + head * G * stride_q_head
        p_scores = scores_ptr + (i_req.to(tl.int64) * H + head) * stride_scores
        for c in tl.static_range(len(VARIANTS)):
            if variant == VARIANTS[c]:
                _score(
                    p_q, p_scores, first, segments, boundary, scale, head, p_head, archive_ptr,
                    p_table, order_ptr, numbers_ptr, stride_q_head, stride_archive_page,
                    VARIANTS[c], SINK, H, G, D, BLOCK, AT_ONCE,
                )  # fmt: skip


@triton.jit(
    do_not_specialize=["stride_archive_table", "stride_scores", "stride_request", "stride_head"],
    do_not_specialize_on_alignment=PARAMETERS,
)
def _pick_kernel(
    scores_ptr, selected_ptr, archive_table_ptr, seq_lens_ptr, exact_until_ptr, heads_ptr,
    stride_archive_table, stride_scores, stride_request, stride_head,
    SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    SELECTION: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best segments of a request and KV head, ascending: page and number of each; of segments
    that score alike, to a 65,535th of the range of scores, the first.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_req, head = tl.program_id(0), tl.program_id(1)
    _, segments = _far_segments(seq_lens_ptr, exact_until_ptr, i_req, SINK, RECENT)
    count = selected(segments, SELECTION)
    variant = tl.load(heads_ptr + 5 * head)
    if PDL:
        tl.extra.cuda.gdc_wait()  # as above
    if (variant > 0) & (segments > 0):
        o_s = tl.arange(0, MOST)
        exists = o_s < segments
        if count < segments:
            p_scores = scores_ptr + (i_req.to(tl.int64) * H + head) * stride_scores
            score = tl.load(p_scores + o_s, mask=exists, other=0.0)
            least = tl.min(tl.where(exists, score, float("inf")), 0)
            most = tl.max(tl.where(exists, score, float("-inf")), 0)
            key = ((score - least) * (65535 / tl.maximum(most - least, 1e-30))).to(tl.int32)
            # Whatever scores are, NaN included, keys are in order, and as many are found as asked.
            key = tl.where(exists, tl.minimum(tl.maximum(key, 0), 65535), -1)
            bar = segments * 0
            for bit in tl.static_range(16):
                higher = bar | 32768 >> bit
                bar = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= count, higher, bar)
            above = (key > bar).to(tl.int32)
            equal = (key == bar).to(tl.int32)
            rest = count - tl.sum(above, 0)
            rank_above = tl.cumsum(above, 0) - above
            rank_equal = tl.cumsum(equal, 0) - equal
            chosen = (above > 0) | ((equal > 0) & (rank_equal < rest))
            rank = rank_above + tl.minimum(rank_equal, rest)
        else:
            chosen = exists
            rank = o_s
        segment = SINK // 64 + o_s
        p_table = archive_table_ptr + i_req.to(tl.int64) * stride_archive_table
        page = tl.load(p_table + segment * 64 // BLOCK, mask=chosen, other=0)
        p_selected = selected_ptr + i_req.to(tl.int64) * stride_request + head * stride_head
        tl.store(p_selected + 2 * rank, page, mask=chosen)
        tl.store(p_selected + 2 * rank + 1, segment, mask=chosen)


def select(query: torch.Tensor, cache: LayerCache, batch: Batch, scale: float) -> torch.Tensor:
    """Segments that queries read, one query per request.

    Args:
        query: `[num_reqs or more, num_heads, head_dim]`, after RoPE; row i is the last token of
            request i.
        cache: the layer's pages, with a `selection`.
        batch: the step's requests.
        scale: factor of the QK product.

    Returns:
        int32 `[num_reqs, num_kv_heads, n, 2]`: page and number of each segment that is read, in
        ascending order. As many as `Selection.count` says are written, and what is behind them may
        be anything.
    """
    rows, *heads = query.shape
    num_reqs, width = min(rows, batch.num_reqs), batch.archive_table.shape[1]
    most = width * cache.layout.archive_block // SEGMENT
    assert cache.selection is not None
    capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
    shape = num_reqs, len(cache.heads), most, cache.selection
    # As in decode: a graph needs memory of its own.
    scores, found = _memory(batch, *shape) if capturing else batch.prepared(_memory, *shape)
    launches = cache.prepared(
        _launches, *heads, query.stride(), scores.stride(1), found.stride()[:2],
        batch.archive_table.stride(0), most, scale,
    )  # fmt: skip
    lengths = batch.archive_table, batch.seq_lens, batch.exact_until
    programs = num_reqs, len(cache.heads)
    launches[0]((*programs, triton.cdiv(most, AT_ONCE)), query, scores, *lengths)
    launches[1]((*programs, 1), scores, found, *lengths)
    return found


def _memory(
    batch: Batch, num_reqs: int, heads: int, most: int, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of segments, and those that are selected. Layers take the same in turn."""
    count = selection.count(most)
    device = batch.seq_lens.device
    scores = torch.empty((num_reqs, heads, most), dtype=torch.float32, device=device)
    return scores, torch.empty((num_reqs, heads, count, 2), dtype=torch.int32, device=device)


def _launches(
    cache: LayerCache,
    num_heads: int,
    head_dim: int,
    query_strides: tuple[int, ...],
    scores_stride: int,
    found_strides: tuple[int, int],
    table_stride: int,
    most: int,
    scale: float,
) -> tuple[Launch, Launch]:
    layout, tables, selection = cache.layout, cache.tables, cache.selection
    assert selection is not None
    shared = {
        "heads_ptr": tables.heads,
        "stride_archive_table": table_stride,
        "stride_scores": scores_stride,
        "SINK": cache.window.sink,
        "RECENT": cache.window.recent,
        "H": len(layout.profiles),
        "BLOCK": layout.archive_block,
        "SELECTION": (selection.share, selection.least),
        "PDL": tables.device.tma,
        "launch_pdl": tables.device.tma,
    }
    lengths = "archive_table_ptr", "seq_lens_ptr", "exact_until_ptr"
    score = Launch(
        _score_kernel,
        ("q_ptr", "scores_ptr", *lengths),
        **shared,
        archive_ptr=cache.archive_pages,
        order_ptr=tables.order,
        numbers_ptr=tables.numbers,
        scale=scale,
        stride_q_token=query_strides[0],
        stride_q_head=query_strides[1],
        stride_archive_page=cache.archive_pages.stride(0),
        VARIANTS=tables.variants,
        G=num_heads // len(layout.profiles),
        D=head_dim,
        AT_ONCE=AT_ONCE,
        num_warps=4,
    )
    pick = Launch(
        _pick_kernel,
        ("scores_ptr", "selected_ptr", *lengths),
        **shared,
        stride_request=found_strides[0],
        stride_head=found_strides[1],
        MOST=triton.next_power_of_2(most),
        num_warps=4 if most <= 4096 else 16,
    )
    return score, pick
