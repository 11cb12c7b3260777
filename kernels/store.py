"""Store new keys and values in window pages, and compact what left the window into the archive."""

import torch
import triton
import triton.language as tl
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.common import BATCH_POINTERS, boundary_of
from vllm_leank.kernels.launch import compact_programs
from vllm_leank.kernels.launcher import Launch


@triton.jit
def _store_token(
    i_token, key_ptr, value_ptr, window_ptr, slots_ptr,
    stride_k_token, stride_k_head, stride_v_token, stride_v_head, stride_window_page,
    H: tl.constexpr, H_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.load(slots_ptr + i_token).to(tl.int64)
    if slot >= 0:
        o_h = tl.arange(0, H_PAD)[:, None]
        o_d = tl.arange(0, D_PAD)[None, :]
        mask = (o_h < H) & (o_d < D)
        token = i_token.to(tl.int64)
        key = tl.load(key_ptr + token * stride_k_token + o_h * stride_k_head + o_d, mask=mask)
        value = tl.load(value_ptr + token * stride_v_token + o_h * stride_v_head + o_d, mask=mask)
        p_slot = window_ptr + slot // WINDOW_BLOCK * stride_window_page
        p_slot += slot % WINDOW_BLOCK * (2 * D)
        p_slot += o_h * (WINDOW_BLOCK * 2 * D) + o_d
        tl.store(p_slot, key, mask=mask)
        tl.store(p_slot + D, value, mask=mask)


@triton.jit
def _compact_head(
    i_row, head, i_program, num_programs,
    window_ptr, archive_ptr, side_ptr, window_table_ptr, archive_table_ptr,
    query_start_ptr, seq_lens_ptr, exact_until_ptr, heads_ptr, order_ptr, numbers_ptr, columns_ptr,
    stride_window_page, stride_archive_page, stride_side,
    stride_window_table, stride_archive_table,
    VARIANTS: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, KEPT_PAD: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`Window.compaction` of one request and KV head; a program takes every `num_programs`-th
    step of 32 tokens.
    """
    p_head = heads_ptr + 5 * head
    variant = tl.load(p_head)
    after = tl.load(seq_lens_ptr + i_row)
    before = after - (tl.load(query_start_ptr + i_row + 1) - tl.load(query_start_ptr + i_row))
    exact_until = tl.load(exact_until_ptr + i_row)
    start = tl.where(before < exact_until, SINK, boundary_of(before, SINK, RECENT))
    stop = boundary_of(after, SINK, RECENT)
    if (variant > 0) & (after >= exact_until) & (start < stop):
        TILES.compact(
            start + 32 * i_program, stop, 32 * num_programs, variant, head, p_head,
            window_ptr, archive_ptr, side_ptr,
            window_table_ptr + i_row.to(tl.int64) * stride_window_table,
            archive_table_ptr + i_row.to(tl.int64) * stride_archive_table,
            order_ptr, numbers_ptr, columns_ptr,
            stride_window_page, stride_archive_page, stride_side,
            VARIANTS, SINK, H, D, D_PAD, KEPT_PAD, BLOCK, WINDOW_BLOCK, TILES,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["programs_per_head", "stride_window_table", "stride_archive_table"],
    do_not_specialize_on_alignment=BATCH_POINTERS,
)
def _update_kernel(
    key_ptr, value_ptr, window_ptr, archive_ptr, side_ptr, slots_ptr,
    window_table_ptr, archive_table_ptr, query_start_ptr, seq_lens_ptr, exact_until_ptr,
    heads_ptr, order_ptr, numbers_ptr, columns_ptr, programs_per_head,
    stride_k_token, stride_k_head, stride_v_token, stride_v_head,
    stride_window_page, stride_archive_page, stride_side,
    stride_window_table, stride_archive_table,
    VARIANTS: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr,
    H_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, KEPT_PAD: tl.constexpr,
    BLOCK: tl.constexpr, WINDOW_BLOCK: tl.constexpr, TILES: tl.constexpr, STORE: tl.constexpr,
    COMPACT: tl.constexpr,
):  # fmt: skip
    """Store token `i` and compact request `i`; both at once where each request has one token."""
    i, role = tl.program_id(0), tl.program_id(1)
    if STORE:
        if role == 0:
            _store_token(
                i, key_ptr, value_ptr, window_ptr, slots_ptr,
                stride_k_token, stride_k_head, stride_v_token, stride_v_head, stride_window_page,
                H, H_PAD, D, D_PAD, WINDOW_BLOCK,
            )  # fmt: skip
        role -= 1
    if COMPACT and role >= 0:
        _compact_head(
            i, role % H, role // H, programs_per_head,
            window_ptr, archive_ptr, side_ptr, window_table_ptr, archive_table_ptr,
            query_start_ptr, seq_lens_ptr, exact_until_ptr, heads_ptr, order_ptr, numbers_ptr,
            columns_ptr, stride_window_page, stride_archive_page, stride_side,
            stride_window_table, stride_archive_table,
            VARIANTS, SINK, RECENT, H, D, D_PAD, KEPT_PAD, BLOCK, WINDOW_BLOCK, TILES,
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
    launch = cache.prepared(
        _prepare, key.stride(), value.stride(), batch.table_strides, store, compact
    )
    heads = len(cache.layout.profiles)
    programs = compact_programs(batch.num_reqs, heads, batch.max_query_len) if compact else 0
    launch(
        (rows, store + heads * programs, 1),
        key, value, batch.slots, batch.window_table, batch.archive_table, batch.query_start_loc,
        batch.seq_lens, batch.exact_until, programs,
    )  # fmt: skip


def _prepare(
    cache: LayerCache,
    key_strides: tuple[int, ...],
    value_strides: tuple[int, ...],
    table_strides: tuple[int, int],
    store: bool,
    compact: bool,
) -> Launch:
    layout, tables, window = cache.layout, cache.tables, cache.window
    heads = len(layout.profiles)
    return Launch(
        _update_kernel,
        ("key_ptr", "value_ptr", *BATCH_POINTERS, "programs_per_head"),
        window_ptr=cache.window_pages,
        archive_ptr=cache.archive_pages,
        side_ptr=cache.side,
        heads_ptr=tables.heads,
        order_ptr=tables.order,
        numbers_ptr=tables.numbers,
        columns_ptr=tables.columns,
        stride_k_token=key_strides[0],
        stride_k_head=key_strides[1],
        stride_v_token=value_strides[0],
        stride_v_head=value_strides[1],
        stride_window_page=cache.window_pages.stride(0),
        stride_archive_page=cache.archive_pages.stride(0),
        stride_side=cache.side.stride(0),
        stride_window_table=table_strides[0],
        stride_archive_table=table_strides[1],
        VARIANTS=tables.variants,
        SINK=window.sink,
        RECENT=window.recent,
        H=heads,
        H_PAD=triton.next_power_of_2(heads),
        D=layout.head_dim,
        D_PAD=triton.next_power_of_2(layout.head_dim),
        KEPT_PAD=triton.next_power_of_2(max((one.kept for one in layout.variants), default=1) or 1),
        BLOCK=layout.archive_block,
        WINDOW_BLOCK=layout.window_block,
        TILES=cache.codec.tiles,
        STORE=store,
        COMPACT=compact,
        num_warps=4,
    )
