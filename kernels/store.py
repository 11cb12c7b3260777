"""Store new keys and values in window pages, and compact what left the window into the archive."""

import torch
import triton
import triton.language as tl
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.common import boundary_of
from vllm_leank.kernels.launch import compact_programs
from vllm_leank.kernels.launcher import launch


@triton.jit
def _store_token(
    i_token, key_ptr, value_ptr, window_ptr, slots_ptr,
    stride_k_token, stride_k_head, stride_v_token, stride_v_head, stride_window_page,
    H: tl.constexpr, H_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    slot = tl.load(slots_ptr + i_token).to(tl.int64)
    if slot >= 0:
        o_h = tl.arange(0, H_PAD)[:, None]
        o_d = tl.arange(0, D_PAD)[None, :]
        mask = (o_h < H) & (o_d < D)
        token = i_token.to(tl.int64)
        key = tl.load(key_ptr + token * stride_k_token + o_h * stride_k_head + o_d, mask=mask)
        value = tl.load(value_ptr + token * stride_v_token + o_h * stride_v_head + o_d, mask=mask)
        p_slot = window_ptr + slot // 32 * stride_window_page + slot % 32 * (2 * D)
        p_slot += o_h * (32 * 2 * D) + o_d
        tl.store(p_slot, key, mask=mask)
        tl.store(p_slot + D, value, mask=mask)


@triton.jit
def _compact_head(
    i_row, head, i_program, num_programs,
    window_ptr, archive_ptr, side_ptr, window_table_ptr, archive_table_ptr,
    query_start_ptr, seq_lens_ptr, exact_until_ptr, heads_ptr, columns_ptr,
    stride_window_page, stride_archive_page, stride_side,
    stride_window_table, stride_archive_table,
    SINK: tl.constexpr, RECENT: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    KEPT_PAD: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`Window.compaction` of one request and KV head; a program takes every `num_programs`-th
    step of 32 tokens.
    """
    p_head = heads_ptr + 5 * head
    kept = tl.load(p_head)
    after = tl.load(seq_lens_ptr + i_row)
    before = after - (tl.load(query_start_ptr + i_row + 1) - tl.load(query_start_ptr + i_row))
    exact_until = tl.load(exact_until_ptr + i_row)
    start = tl.where(before < exact_until, SINK, boundary_of(before, SINK, RECENT))
    stop = boundary_of(after, SINK, RECENT)
    if (kept > 0) & (after >= exact_until) & (start < stop):
        v_offset = tl.load(p_head + 3)
        side_offset = tl.load(p_head + 4)
        o_c = tl.arange(0, KEPT_PAD)
        m_c = o_c < kept
        p_column = columns_ptr + 3 * (tl.load(p_head + 1) + o_c)
        channel = tl.load(p_column, mask=m_c, other=0)
        column = tl.load(p_column + 1, mask=m_c, other=0)
        width = tl.load(p_column + 2, mask=m_c, other=0)
        o_32 = tl.arange(0, 32)
        o_d = tl.arange(0, D_PAD)
        m_d = o_d < D
        p_window_table = window_table_ptr + i_row.to(tl.int64) * stride_window_table
        p_archive_table = archive_table_ptr + i_row.to(tl.int64) * stride_archive_table
        for token in range(start + 32 * i_program, stop, 32 * num_programs):
            source = tl.load(p_window_table + token // 32).to(tl.int64)
            page = tl.load(p_archive_table + token // BLOCK).to(tl.int64)
            slot = token % BLOCK
            p_source = window_ptr + source * stride_window_page + (head * 32 + o_32) * (2 * D)
            k = tl.load(p_source[:, None] + channel[None, :], mask=m_c[None, :], other=0.0)
            v = tl.load(p_source[None, :] + D + o_d[:, None], mask=m_d[:, None], other=0.0)
            if TILES.SCALED:
                k, k_scale = TILES.encode(k.to(tl.float32))
                v, v_scale = TILES.encode(v.to(tl.float32))
                p_scale = side_ptr + page * stride_side + side_offset + slot // 32 * 2
                tl.store(p_scale, k_scale)
                tl.store(p_scale + 1, v_scale)
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
                    if TILES.SCALED:
                        tl.store(p_scale + (i - slot) // 32 * 2, 1.0)
                        tl.store(p_scale + (i - slot) // 32 * 2 + 1, 1.0)
            if token == SINK:
                for i in range(0, slot, 32):
                    tl.store(p_v + i, empty, mask=m_d[:, None])
                    if TILES.SCALED:
                        tl.store(p_scale - (slot - i) // 32 * 2, 1.0)
                        tl.store(p_scale - (slot - i) // 32 * 2 + 1, 1.0)


@triton.jit(do_not_specialize=["programs_per_head", "stride_window_table", "stride_archive_table"])
def _update_kernel(
    key_ptr, value_ptr, window_ptr, archive_ptr, side_ptr, slots_ptr,
    window_table_ptr, archive_table_ptr, query_start_ptr, seq_lens_ptr, exact_until_ptr,
    heads_ptr, columns_ptr, programs_per_head,
    stride_k_token, stride_k_head, stride_v_token, stride_v_head,
    stride_window_page, stride_archive_page, stride_side,
    stride_window_table, stride_archive_table,
    SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr, H_PAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, KEPT_PAD: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, STORE: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """Store token `i` and compact request `i`; both at once where each request has one token."""
    i, role = tl.program_id(0), tl.program_id(1)
    if STORE:
        if role == 0:
            _store_token(
                i, key_ptr, value_ptr, window_ptr, slots_ptr,
                stride_k_token, stride_k_head, stride_v_token, stride_v_head, stride_window_page,
                H, H_PAD, D, D_PAD,
            )  # fmt: skip
        role -= 1
    if COMPACT and role >= 0:
        _compact_head(
            i, role % H, role // H, programs_per_head,
            window_ptr, archive_ptr, side_ptr, window_table_ptr, archive_table_ptr,
            query_start_ptr, seq_lens_ptr, exact_until_ptr, heads_ptr, columns_ptr,
            stride_window_page, stride_archive_page, stride_side,
            stride_window_table, stride_archive_table,
            SINK, RECENT, D, D_PAD, KEPT_PAD, BLOCK, TILES,
        )  # fmt: skip


def update(key: torch.Tensor, value: torch.Tensor, cache: LayerCache, batch: Batch) -> None:
    """Store and compact a step in which each request has one token, in one launch.

    That is safe: what leaves the window is at least 32 tokens old.

    Args:
        key: `[num_reqs, num_kv_heads, head_dim]`.
        value: like `key`.
        cache: the layer's pages.
        batch: the step's requests, all with one token; padded ones with slot -1.
    """
    _launch(key, value, cache, batch, batch.num_reqs, store=True, compact=True)


def store(key: torch.Tensor, value: torch.Tensor, cache: LayerCache, batch: Batch) -> None:
    """Write new keys and values to the window pages; see `reference.store`."""
    num_tokens = min(len(batch.slots), len(key))
    _launch(key, value, cache, batch, num_tokens, store=True, compact=False)


def compact(cache: LayerCache, batch: Batch) -> None:
    """Copy what left the dense window in this step to the archive; see `reference.compact`."""
    nothing = cache.window_pages[:, :, 0]
    _launch(nothing, nothing, cache, batch, batch.num_reqs, store=False, compact=True)


def _launch(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerCache,
    batch: Batch,
    rows: int,
    *,
    store: bool,
    compact: bool,
) -> None:
    layout, tables, window = cache.layout, cache.tables, cache.window
    heads = len(layout.profiles)
    programs = compact_programs(batch.num_reqs, heads, batch.max_query_len) if compact else 0
    launch(
        _update_kernel, (rows, store + heads * programs),
        key, value, cache.window_pages, cache.archive_pages, cache.side, batch.slots,
        batch.window_table, batch.archive_table, batch.query_start_loc, batch.seq_lens,
        batch.exact_until, tables.heads, tables.columns, programs,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        cache.window_pages.stride(0), cache.archive_pages.stride(0), cache.side.stride(0),
        batch.window_table.stride(0), batch.archive_table.stride(0),
        SINK=window.sink,
        RECENT=window.recent,
        H=heads,
        H_PAD=triton.next_power_of_2(heads),
        D=layout.head_dim,
        D_PAD=triton.next_power_of_2(layout.head_dim),
        KEPT_PAD=triton.next_power_of_2(max((one.kept for one in layout.variants), default=1)),
        BLOCK=layout.archive_block,
        TILES=cache.codec.tiles,
        STORE=store,
        COMPACT=compact,
        num_warps=4,
    )  # fmt: skip
