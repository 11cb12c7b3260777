"""Unpacks far tokens of requests into the scratch, once for all queries of a step."""

import triton
import triton.language as tl
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.common import BATCH_POINTERS, boundary_of
from vllm_leank.kernels.launcher import Launch
from vllm_leank.kernels.scratch import Regions

TILE = 64
"""Tokens that are unpacked at once."""

TILES_OF_PROGRAM = 4


@triton.jit(
    do_not_specialize=["first", "region", "stride_archive_table"],
    do_not_specialize_on_alignment=BATCH_POINTERS,
)
def _unpack_kernel(
    key_ptr, value_ptr, archive_ptr, side_ptr, archive_table_ptr, seq_lens_ptr,
    heads_ptr, order_ptr, numbers_ptr, first, region,
    stride_head, stride_archive_page, stride_side, stride_archive_table,
    SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    TOKENS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    kind, head, i_req = tl.program_id(1) % 2, tl.program_id(1) // 2, tl.program_id(2)
    begin = SINK + first
    end = tl.minimum(boundary_of(tl.load(seq_lens_ptr + i_req), SINK, RECENT), begin + region)
    filled = begin + tl.cdiv(end - begin, PAGE) * PAGE
    token = begin // TILE * TILE + tl.program_id(0) * TOKENS
    stop = tl.minimum(token + TOKENS, tl.cdiv(filled, TILE) * TILE)
    p_head = heads_ptr + 5 * head
    if (tl.load(p_head) > 0) & (begin < end) & (token < filled):
        p_region = stride_head * head + i_req * region * D
        TILES.unpack(
            token, stop, begin, end, filled, kind, head, p_head, order_ptr, numbers_ptr,
            archive_table_ptr + i_req.to(tl.int64) * stride_archive_table, archive_ptr, side_ptr,
            stride_archive_page, stride_side, key_ptr + p_region, value_ptr + p_region,
            H, D, D_PAD, TILE, BLOCK,
        )  # fmt: skip


def unpack(cache: LayerCache, batch: Batch, regions: Regions, first: int) -> None:
    """Unpack far tokens of a layer into its scratch.

    Args:
        cache: the layer's pages.
        batch: requests, no more than have room at once.
        regions: how they share the scratch.
        first: of each request's far tokens, the first that is unpacked; as many follow as have
            room.
    """
    heads, tokens = len(cache.layout.profiles), TILE * TILES_OF_PROGRAM
    launch = cache.prepared(_prepare, batch.table_strides[1])
    launch(
        (triton.cdiv(regions.tokens + TILE, tokens), 2 * heads, batch.num_reqs),
        batch.archive_table, batch.seq_lens, first, regions.tokens,
    )  # fmt: skip


def _prepare(cache: LayerCache, stride_archive_table: int) -> Launch:
    layout, tables, scratch = cache.layout, cache.tables, cache.scratch
    assert scratch is not None
    key, value = scratch.pages
    padded = triton.next_power_of_2(layout.head_dim)
    return Launch(
        _unpack_kernel,
        ("archive_table_ptr", "seq_lens_ptr", "first", "region"),
        key_ptr=key,
        value_ptr=value,
        archive_ptr=cache.archive_pages,
        side_ptr=cache.side,
        heads_ptr=tables.heads,
        order_ptr=tables.order,
        numbers_ptr=tables.numbers,
        stride_head=key.stride(0),
        stride_archive_page=cache.archive_pages.stride(0),
        stride_side=cache.side.stride(0),
        stride_archive_table=stride_archive_table,
        SINK=cache.window.sink,
        RECENT=cache.window.recent,
        H=len(layout.profiles),
        D=layout.head_dim,
        D_PAD=padded,
        PAGE=scratch.page,
        BLOCK=layout.archive_block,
        TILE=TILE,
        TOKENS=TILE * TILES_OF_PROGRAM,
        TILES=cache.codec.tiles,
        # Each thread has 32 numbers of a tile, and few enough registers for 16 warps at once.
        num_warps=max(padded // 16, 1),
        maxnreg=128,
        # Products and sums are rounded one by one, as the reference does.
        enable_fp_fusion=False,
    )
