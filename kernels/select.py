"""Selects the segments of far tokens that a query reads, by the lead of their K.

Two launches: one scores all segments, over many programs, and one picks the best of each KV head.
"""

import torch
import triton
import triton.language as tl
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.common import BATCH_POINTERS, boundary_of
from vllm_leank.kernels.launcher import Launch
from vllm_leank.kernels.shares import selected

from vllm_leank.core.selection import SEGMENT, Selection

SEGMENTS = 4
"""Segments that a program scores, one after the other: few, so that many programs wait at once."""

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


@triton.jit(
    do_not_specialize=["stride_archive_table", "stride_scores"],
    do_not_specialize_on_alignment=PARAMETERS,
)
def _score_kernel(
    q_ptr, scores_ptr, archive_ptr, archive_table_ptr, seq_lens_ptr, exact_until_ptr,
    heads_ptr, order_ptr, numbers_ptr, stride_q_token, stride_q_head,
    stride_archive_page, stride_archive_table, stride_scores,
    VARIANTS: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, G_PAD: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    SELECTION: tl.constexpr, SEGMENTS: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Scores of `SEGMENTS` segments of a request and KV head, for each query head: the best
    product with a token's lead.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    i_req, head = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2) * SEGMENTS
    boundary, segments = _far_segments(seq_lens_ptr, exact_until_ptr, i_req, SINK, RECENT)
    if PDL:
        # By all programs: whoever waits for this launch then waits for those before it as well.
        tl.extra.cuda.gdc_wait()
    if (first < segments) & (segments > selected(segments, SELECTION)):
        p_head = heads_ptr + 5 * head
        variant = tl.load(p_head)
        # Else rows are loaded byte by byte.
        archive_ptr += tl.multiple_of(tl.load(p_head + 2), 16)
        p_table = archive_table_ptr + i_req.to(tl.int64) * stride_archive_table
        o_g = tl.arange(0, G_PAD)
        p_q = q_ptr + i_req.to(tl.int64) * stride_q_token + (head * G + o_g) * stride_q_head
        p_scores = scores_ptr + (i_req.to(tl.int64) * H + head) * (G * stride_scores)
        p_order, p_factor = order_ptr + head * D, numbers_ptr + (H + head) * D
        for c in tl.static_range(len(VARIANTS)):
            if variant == VARIANTS[c]:
                q = TILES.lead_query(p_q, o_g < G, p_order, p_factor, VARIANTS[c])
                for segment in tl.range(first, min(first + SEGMENTS, segments), num_stages=2):
                    begin = (SINK // 64 + segment) * 64
                    page = tl.load(p_table + begin // BLOCK).to(tl.int64)
                    p_page = archive_ptr + page * stride_archive_page
                    slot, token = begin % BLOCK + tl.arange(0, 64), begin + tl.arange(0, 64)
                    s = TILES.lead_scores(q, p_page, slot, VARIANTS[c], TILES.ASM)
                    seen = (token >= SINK) & (token < boundary)
                    s = tl.where(seen[:, None], s, float("-inf"))
                    p_best = p_scores + o_g * stride_scores + segment
                    tl.store(p_best, tl.max(s, 0), mask=o_g < G)


@triton.jit(
    do_not_specialize=["stride_archive_table", "stride_scores", "stride_request", "stride_head"],
    do_not_specialize_on_alignment=PARAMETERS,
)
def _pick_kernel(
    scores_ptr, selected_ptr, archive_table_ptr, seq_lens_ptr, exact_until_ptr, heads_ptr,
    stride_archive_table, stride_scores, stride_request, stride_head,
    SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    BLOCK: tl.constexpr, SELECTION: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best segments of a request and KV head, ascending: page and number of each. A segment is
    as good as it comes close to what a query head has for its best, for one of the query heads; of
    segments that are alike, to a 65,535th of the range, the first.
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
            p_scores = scores_ptr + (i_req.to(tl.int64) * H + head) * (G * stride_scores)
            score = tl.full([MOST], float("-inf"), tl.float32)
            for g in tl.static_range(G):
                of_head = tl.load(
                    p_scores + g * stride_scores + o_s, mask=exists, other=float("-inf")
                )
                score = tl.maximum(score, of_head - tl.max(of_head, 0))
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


def select(query: torch.Tensor, cache: LayerCache, batch: Batch) -> torch.Tensor:
    """Segments that queries read, one query per request.

    Args:
        query: `[num_reqs or more, num_heads, head_dim]`, after RoPE; row i is the last token of
            request i.
        cache: the layer's pages, with a `selection`.
        batch: the step's requests.

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
    shape = num_reqs, heads[0], len(cache.heads), most, cache.selection
    # As in decode: a graph needs memory of its own.
    scores, found = _memory(batch, *shape) if capturing else batch.prepared(_memory, *shape)
    launches = cache.prepared(
        _launches, *heads, query.stride(), scores.stride(1), found.stride()[:2],
        batch.archive_table.stride(0), most,
    )  # fmt: skip
    lengths = batch.archive_table, batch.seq_lens, batch.exact_until
    programs = num_reqs, len(cache.heads)
    launches[0]((*programs, triton.cdiv(most, SEGMENTS)), query, scores, *lengths)
    launches[1]((*programs, 1), scores, found, *lengths)
    return found


def _memory(
    batch: Batch, num_reqs: int, num_heads: int, num_kv_heads: int, most: int, selection: Selection
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of segments for each query head, and the segments that are selected for each KV head.
    Layers take the same in turn.
    """
    device, count = batch.seq_lens.device, selection.count(most)
    scores = torch.empty((num_reqs, num_heads, most), dtype=torch.float32, device=device)
    return scores, torch.empty((num_reqs, num_kv_heads, count, 2), dtype=torch.int32, device=device)


def _launches(
    cache: LayerCache,
    num_heads: int,
    head_dim: int,
    query_strides: tuple[int, ...],
    scores_stride: int,
    found_strides: tuple[int, int],
    table_stride: int,
    most: int,
) -> tuple[Launch, Launch]:
    layout, tables, selection = cache.layout, cache.tables, cache.selection
    assert selection is not None
    group = num_heads // len(layout.profiles)
    shared = {
        "heads_ptr": tables.heads,
        "stride_archive_table": table_stride,
        "stride_scores": scores_stride,
        "SINK": cache.window.sink,
        "RECENT": cache.window.recent,
        "H": len(layout.profiles),
        "G": group,
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
        stride_q_token=query_strides[0],
        stride_q_head=query_strides[1],
        stride_archive_page=cache.archive_pages.stride(0),
        VARIANTS=tables.variants,
        G_PAD=max(triton.next_power_of_2(group), 8),
        D=head_dim,
        SEGMENTS=SEGMENTS,
        TILES=cache.codec.tiles,
        num_warps=1,
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
