"""Where every byte of a page is, and the page sizes of whole models in literal numbers."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_leank.core.layout import (
    ARCHIVE_BLOCKS,
    ARCHIVE_WASTE,
    CHUNK_WIDTHS,
    CacheLayout,
    archive_token_bytes,
    plan_cache,
    rank_heads,
    uneven,
)
from vllm_leank.core.window import Window

OFFICIAL_MASKS = Path(__file__).parents[2] / "shared" / "official-masks"

counts = st.integers(0, 16).map(lambda n: n * 16)
layouts = st.builds(
    lambda kept, head_dim, archive_itemsize, block, spare: CacheLayout(
        tuple(kept),
        head_dim,
        2,
        archive_itemsize,
        block,
        (archive_token_bytes(kept, head_dim, archive_itemsize) + spare) * block,
    ),
    st.lists(counts, min_size=1, max_size=8),
    st.sampled_from([64, 96, 128, 256]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([32, 64, 96, 256]),
    st.sampled_from([0, 16, 640]),
)


@settings(max_examples=300, deadline=None)
@given(layouts)
def test_chunks_values_and_scales_tile_the_page(layout):
    parts, scales = [], []
    for kept, head in zip(layout.kept, layout.heads, strict=True):
        columns = [
            c for chunk in head.k_chunks for c in range(chunk.first, chunk.first + chunk.width)
        ]
        assert columns == list(range(kept))
        assert all(chunk.width in CHUNK_WIDTHS for chunk in head.k_chunks)
        assert all(chunk.offset % chunk.width == 0 for chunk in head.k_chunks)
        parts += [(chunk.offset, chunk.width) for chunk in head.k_chunks]
        assert (head.v_offset is None) == (kept == 0)
        if head.v_offset is not None:
            parts.append((head.v_offset, layout.head_dim))
        assert (head.scale_offset is None) == (kept == 0 or layout.archive_itemsize > 1)
        if head.scale_offset is not None:
            scales.append(head.scale_offset)
    end = 0
    for offset, width in parts:
        assert offset == end
        end += width * layout.archive_block
    end *= layout.archive_itemsize
    for offset in scales:
        assert offset == end
        assert offset % 4 == 0
        end += 2 * 4 * layout.archive_block // 32
    token_bytes = archive_token_bytes(layout.kept, layout.head_dim, layout.archive_itemsize)
    assert end <= token_bytes * layout.archive_block <= layout.archive_page_bytes
    assert end > (token_bytes - 1) * layout.archive_block


@pytest.mark.parametrize(
    ("kept", "widths"),
    [
        (0, []),
        (16, [16]),
        (32, [32]),
        (48, [32, 16]),
        (64, [64]),
        (80, [64, 16]),
        (96, [64, 32]),
        (112, [64, 32, 16]),
        (128, [128]),
        (176, [128, 32, 16]),
        (240, [128, 64, 32, 16]),
        (256, [256]),
    ],
)
def test_chunks_have_binary_widths_widest_first(kept, widths):
    head = CacheLayout((kept,), 256, 2, 2, 64, 1 << 20).heads[0]
    assert [chunk.width for chunk in head.k_chunks] == widths


def test_offsets_of_a_page_in_literal_numbers():
    layout = CacheLayout((48, 0, 16), 128, 2, 2, 64, 64 * 640)
    first, second, third = layout.heads
    assert [(c.offset, c.width, c.first) for c in first.k_chunks] == [(0, 32, 0), (2048, 16, 32)]
    assert first.v_offset == 3072
    assert (second.k_chunks, second.v_offset, second.scale_offset) == ((), None, None)
    assert [(c.offset, c.width, c.first) for c in third.k_chunks] == [(11264, 16, 0)]
    assert third.v_offset == 12288
    assert layout.archive_page_items == 20480
    assert layout.window_page_bytes == 3 * 32 * 2 * 128 * 2
    assert [head.scale_offset for head in layout.heads] == [None] * 3


def test_offsets_of_an_fp8_page_in_literal_numbers():
    """Scales of a head: 2 of K, one for each 32 tokens, and 2 of V."""
    layout = CacheLayout((112, 0, 16), 128, 2, 1, 64, 64 * 400)
    first, second, third = layout.heads
    assert [(c.offset, c.width, c.first) for c in first.k_chunks] == [
        (0, 64, 0), (4096, 32, 64), (6144, 16, 96)
    ]  # fmt: skip
    assert (first.v_offset, first.scale_offset) == (7168, 24576)
    assert (second.k_chunks, second.v_offset, second.scale_offset) == ((), None, None)
    assert [(c.offset, c.width, c.first) for c in third.k_chunks] == [(15360, 16, 0)]
    assert (third.v_offset, third.scale_offset) == (16384, 24592)
    assert layout.archive_page_items == 25600
    assert layout.window_page_bytes == 3 * 32 * 2 * 128 * 2


@pytest.mark.parametrize(
    ("kept", "itemsize", "token_bytes"),
    [
        ((48, 0, 16), 2, 640),
        ((48, 0, 16), 1, 320 + 1),
        ((16,) * 8, 1, 1152 + 2),
        ((0, 0), 1, 0),
    ],
)
def test_bytes_of_a_token_include_its_share_of_the_scales(kept, itemsize, token_bytes):
    assert archive_token_bytes(kept, 128, itemsize) == token_bytes


@pytest.mark.parametrize(
    ("itemsize", "page"), [(2, 64 * 320 - 1), (1, 64 * 160), (1, 64 * 161 - 1)]
)
def test_a_page_too_small_for_its_heads_is_refused(itemsize, page):
    with pytest.raises(ValueError, match=r"64 tokens of .* bytes do not fit into an archive page"):
        CacheLayout((32,), 128, 2, itemsize, 64, page)


HAND_WRITTEN = ((32, 64, 0, 96), (0, 0, 0, 0), (32, 32, 32, 32), (128, 128, 128, 128))


@pytest.mark.parametrize(
    ("tp_size", "itemsize", "archive", "token_bytes", "archive_block", "block_bytes", "dense"),
    [
        (1, 2, None, (1280, 16, 1280, 2048), 64, 295936, 8192),
        (1, 4, None, (2560, 16, 2560, 4096), 64, 590848, 16384),
        (2, 2, None, (704, 16, 704, 1024), 64, 156672, 4096),
        (4, 2, None, (512, 16, 320, 512), 64, 87040, 2048),
        (8, 2, None, (512, 16, 320, 512), 64, 87040, 2048),
        (1, 2, 1, (656, 16, 656, 1040), 128, 303104, 8192),
        (1, 4, 1, (656, 16, 656, 1040), 224, 530432, 16384),
        (4, 2, 1, (272, 16, 176, 272), 96, 70656, 2048),
    ],
)
def test_plan_of_a_hand_written_mask(
    tp_size, itemsize, archive, token_bytes, archive_block, block_bytes, dense
):
    plan = plan_cache(HAND_WRITTEN, 128, itemsize, tp_size, archive)
    assert plan.token_bytes == token_bytes
    assert plan.archive_block == archive_block
    assert plan.block_bytes == block_bytes
    assert plan.dense_token_bytes == dense
    assert plan.layer(0, tp_size - 1).archive_page_bytes == token_bytes[0] * archive_block


@pytest.mark.parametrize(
    ("name", "tp_size", "itemsize", "archive", "dense", "archive_block", "block_bytes"),
    [
        ("llama3.1-8b-instruct", 1, 2, 73984, 131072, 64, 4734976),
        ("llama3.1-8b-instruct", 2, 2, 40960, 65536, 64, 2621440),
        ("llama3.1-8b-instruct", 1, 1, 37504, 131072, 128, 4800512),
        ("qwen2.5-7b-instruct", 1, 2, 28048, 57344, 64, 1835008),
        ("qwen2.5-7b-instruct", 2, 2, 16208, 28672, 64, 1037312),
        ("qwen2.5-7b-instruct", 1, 1, 14464, 57344, 128, 1851392),
    ],
)
def test_plan_of_the_official_masks(
    name, tp_size, itemsize, archive, dense, archive_block, block_bytes
):
    path = OFFICIAL_MASKS / f"{name}.pth"
    if not path.exists():
        pytest.skip(f"the official mask {path.name} is not here")
    kept = torch.load(path, weights_only=True).sum(-1).int().tolist()
    plan = plan_cache(kept, 128, 2, tp_size, itemsize)
    window = Window(64, 256)
    assert plan.archive_block == archive_block
    assert plan.archive_token_bytes == archive
    assert plan.dense_token_bytes == dense
    assert plan.block_bytes == block_bytes
    pages = {64: 508, 128: 254}[archive_block]
    assert plan.blocks_in_prefill(window, 32768) == pages + 1024
    assert plan.blocks_in_decode(window, 32768) == pages + 2 + 8


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
@given(masks, st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4]))
def test_every_rank_fits_its_heads_into_pages_of_one_size(mask, tp_size, itemsize):
    plan = plan_cache(mask, 128, 4, tp_size, itemsize)
    assert plan.archive_block in ARCHIVE_BLOCKS
    for index in range(len(mask)):
        sizes = {plan.layer(index, rank).archive_page_bytes for rank in range(tp_size)}
        assert sizes == {plan.token_bytes[index] * plan.archive_block}
        for rank in range(tp_size):
            need = archive_token_bytes(plan.layer(index, rank).kept, 128, itemsize)
            assert 0 <= need <= plan.token_bytes[index]
        assert plan.token_bytes[index] > 0
        assert plan.token_bytes[index] % 16 == 0


@settings(max_examples=200, deadline=None)
@given(masks, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_far_tokens_leave_little_of_a_block_empty(mask, tp_size, archive_itemsize):
    plan = plan_cache(mask, 128, 2, tp_size, archive_itemsize)
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
