"""Where every byte of a page is, and the page sizes of whole models in literal numbers."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_leank.layout import (
    ARCHIVE_BLOCKS,
    ARCHIVE_WASTE,
    CHUNK_WIDTHS,
    CacheLayout,
    archive_token_bytes,
    plan_cache,
    rank_heads,
    uneven,
)
from vllm_leank.window import Window

OFFICIAL_MASKS = Path(__file__).parents[2] / "shared" / "official-masks"

counts = st.integers(0, 16).map(lambda n: n * 16)
layouts = st.builds(
    lambda kept, head_dim, itemsize, block, spare: CacheLayout(
        tuple(kept),
        head_dim,
        itemsize,
        block,
        (archive_token_bytes(kept, head_dim, itemsize) + spare) * block,
    ),
    st.lists(counts, min_size=1, max_size=8),
    st.sampled_from([64, 96, 128, 256]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([32, 64, 96, 256]),
    st.sampled_from([0, 64, 640]),
)


@settings(max_examples=300, deadline=None)
@given(layouts)
def test_chunks_and_values_tile_the_page(layout):
    parts = []
    for kept, head in zip(layout.kept, layout.heads, strict=True):
        columns = [
            c for chunk in head.k_chunks for c in range(chunk.first, chunk.first + chunk.width)
        ]
        assert columns == list(range(kept))
        assert all(chunk.width in CHUNK_WIDTHS for chunk in head.k_chunks)
        parts += [(chunk.offset, chunk.width) for chunk in head.k_chunks]
        assert (head.v_offset is None) == (kept == 0)
        if head.v_offset is not None:
            parts.append((head.v_offset, layout.head_dim))
    end = 0
    for offset, width in parts:
        assert offset == end
        end += width * layout.archive_block
    assert end <= layout.archive_page_items
    assert end * layout.itemsize == layout.archive_block * archive_token_bytes(
        layout.kept, layout.head_dim, layout.itemsize
    )


@pytest.mark.parametrize(
    ("kept", "widths"),
    [
        (0, []),
        (16, [16]),
        (32, [32]),
        (48, [32, 16]),
        (64, [64]),
        (96, [64, 32]),
        (112, [64, 32, 16]),
        (128, [64, 64]),
        (256, [64, 64, 64, 64]),
    ],
)
def test_chunks_are_widest_first(kept, widths):
    head = CacheLayout((kept,), 256, 2, 64, 1 << 20).heads[0]
    assert [chunk.width for chunk in head.k_chunks] == widths


def test_offsets_of_a_page_in_literal_numbers():
    layout = CacheLayout((48, 0, 16), 128, 2, 64, 64 * 640)
    first, second, third = layout.heads
    assert [(c.offset, c.width, c.first) for c in first.k_chunks] == [(0, 32, 0), (2048, 16, 32)]
    assert first.v_offset == 3072
    assert (second.k_chunks, second.v_offset) == ((), None)
    assert [(c.offset, c.width, c.first) for c in third.k_chunks] == [(11264, 16, 0)]
    assert third.v_offset == 12288
    assert layout.archive_page_items == 20480
    assert layout.window_page_bytes == 3 * 32 * 2 * 128 * 2


HAND_WRITTEN = ((32, 64, 0, 96), (0, 0, 0, 0), (32, 32, 32, 32), (128, 128, 128, 128))


@pytest.mark.parametrize(
    ("tp_size", "itemsize", "token_bytes", "archive_block", "block_bytes", "dense"),
    [
        (1, 2, (1280, 64, 1280, 2048), 64, 299008, 8192),
        (1, 4, (2560, 64, 2560, 4096), 64, 593920, 16384),
        (2, 2, (704, 64, 704, 1024), 64, 159744, 4096),
        (4, 2, (512, 64, 320, 512), 64, 90112, 2048),
        (8, 2, (512, 64, 320, 512), 64, 90112, 2048),
    ],
)
def test_plan_of_a_hand_written_mask(
    tp_size, itemsize, token_bytes, archive_block, block_bytes, dense
):
    plan = plan_cache(HAND_WRITTEN, 128, itemsize, tp_size)
    assert plan.token_bytes == token_bytes
    assert plan.archive_block == archive_block
    assert plan.block_bytes == block_bytes
    assert plan.dense_token_bytes == dense
    assert plan.layer(0, tp_size - 1).archive_page_bytes == token_bytes[0] * archive_block


@pytest.mark.parametrize(
    ("name", "tp_size", "archive", "dense", "block_bytes"),
    [
        ("llama3.1-8b-instruct", 1, 73984, 131072, 4734976),
        ("llama3.1-8b-instruct", 2, 40960, 65536, 2621440),
        ("qwen2.5-7b-instruct", 1, 28096, 57344, 1835008),
        ("qwen2.5-7b-instruct", 2, 16256, 28672, 1040384),
    ],
)
def test_plan_of_the_official_masks(name, tp_size, archive, dense, block_bytes):
    path = OFFICIAL_MASKS / f"{name}.pth"
    if not path.exists():
        pytest.skip(f"the official mask {path.name} is not here")
    kept = torch.load(path, weights_only=True).sum(-1).int().tolist()
    plan = plan_cache(kept, 128, 2, tp_size)
    window = Window(64, 256)
    assert plan.archive_block == 64
    assert plan.archive_token_bytes == archive
    assert plan.dense_token_bytes == dense
    assert plan.block_bytes == block_bytes
    assert plan.blocks_in_prefill(window, 32768) == 508 + 1024
    assert plan.blocks_in_decode(window, 32768) == 508 + 2 + 8


def test_blocks_of_short_requests():
    plan = plan_cache(HAND_WRITTEN, 128, 2)
    window = Window(64, 256)
    assert [plan.blocks_in_prefill(window, n) for n in (1, 320, 351, 352)] == [1, 10, 11, 2 + 11]
    assert [plan.blocks_in_decode(window, n) for n in (1, 320, 351, 352)] == [1, 10, 11, 2 + 10]


masks = st.integers(1, 4).flatmap(
    lambda log_heads: st.lists(
        st.lists(
            st.integers(0, 8).map(lambda n: n * 16), min_size=2**log_heads, max_size=2**log_heads
        ),
        min_size=1,
        max_size=12,
    )
)


@settings(max_examples=200, deadline=None)
@given(masks, st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([2, 4]))
def test_every_rank_fits_its_heads_into_pages_of_one_size(mask, tp_size, itemsize):
    plan = plan_cache(mask, 128, itemsize, tp_size)
    assert plan.archive_block in ARCHIVE_BLOCKS
    for index in range(len(mask)):
        sizes = {plan.layer(index, rank).archive_page_bytes for rank in range(tp_size)}
        assert sizes == {plan.token_bytes[index] * plan.archive_block}
        for rank in range(tp_size):
            need = archive_token_bytes(plan.layer(index, rank).kept, 128, itemsize)
            assert 0 <= need <= plan.token_bytes[index]
        assert plan.token_bytes[index] > 0
        assert plan.token_bytes[index] % 64 == 0


@settings(max_examples=200, deadline=None)
@given(masks, st.sampled_from([1, 2, 4]))
def test_far_tokens_leave_little_of_a_block_empty(mask, tp_size):
    plan = plan_cache(mask, 128, 2, tp_size)
    used = plan.archive_token_bytes * plan.archive_block / plan.block_bytes
    assert used >= 1 - ARCHIVE_WASTE or plan.archive_block == max(ARCHIVE_BLOCKS)
    if plan.archive_block > min(ARCHIVE_BLOCKS):
        smaller = plan.archive_token_bytes * (plan.archive_block - 32)
        assert smaller < (1 - ARCHIVE_WASTE) * plan.dense_token_bytes * 32


@settings(max_examples=500, deadline=None)
@given(st.lists(st.integers(1, 12).map(lambda n: n * 64), min_size=1, max_size=40))
def test_uneven_sizes_never_come_in_equal_counts(sizes):
    raised = uneven(sizes)
    counted = Counter(raised)
    assert len(counted) == 1 or len(set(counted.values())) > 1
    assert all(new >= old for new, old in zip(raised, sizes, strict=True))
    assert set(raised) <= set(sizes)
    if len(set(Counter(sizes).values())) > 1:
        assert raised == sizes


@pytest.mark.parametrize(
    ("sizes", "raised"),
    [
        ([64, 128], [128, 128]),
        ([64, 256, 320], [64, 320, 320]),
        ([64, 128, 64, 128], [128, 128, 64, 128]),
        ([64, 64, 64], [64, 64, 64]),
        ([64, 64, 128], [64, 64, 128]),
    ],
)
def test_uneven_raises_one_layer_over_the_smallest_gap(sizes, raised):
    assert uneven(sizes) == raised


@pytest.mark.parametrize(
    ("tp_size", "heads"),
    [
        (1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (8, [[0], [1], [2], [3], [4], [5], [6], [7]]),
        (16, [[head] for head in range(8) for _ in range(2)]),
    ],
)
def test_ranks_share_eight_heads(tp_size, heads):
    assert [list(rank_heads(8, tp_size, rank)) for rank in range(tp_size)] == heads
