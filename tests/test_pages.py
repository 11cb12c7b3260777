"""Where every byte of a layer's pages is."""

import pytest
from cache_builder import FP8
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_leank.core.formats import NATIVE
from vllm_leank.core.pages import CHUNK_WIDTHS, CacheLayout, archive_token_bytes

counts = st.integers(0, 16).map(lambda n: n * 16)
layouts = st.builds(
    lambda kept, head_dim, itemsize, block, archive_format: CacheLayout(
        tuple(kept), head_dim, itemsize, block, archive_format
    ),
    st.lists(counts, min_size=1, max_size=8),
    st.sampled_from([64, 96, 128, 256]),
    st.sampled_from([2, 4]),
    st.sampled_from([32, 64, 96, 256]),
    st.sampled_from([NATIVE, FP8]),
)


@settings(max_examples=300, deadline=None)
@given(layouts)
def test_chunks_values_and_side_data_tile_the_page(layout):
    parts, sides = [], []
    for kept, head in zip(layout.kept, layout.heads, strict=True):
        assert (head is None) == (kept == 0)
        if head is None:
            continue
        columns = [
            c for chunk in head.k_chunks for c in range(chunk.first, chunk.first + chunk.width)
        ]
        assert columns == list(range(kept))
        assert all(chunk.width in CHUNK_WIDTHS for chunk in head.k_chunks)
        assert all(chunk.offset % chunk.width == 0 for chunk in head.k_chunks)
        parts += [(chunk.offset, chunk.width) for chunk in head.k_chunks]
        assert head.k_offset == head.k_chunks[0].offset
        parts.append((head.v_offset, layout.head_dim))
        sides.append(head.side_offset)
    end = 0
    for offset, width in parts:
        assert offset == end
        end += width * layout.archive_block
    end *= layout.archive_itemsize
    for offset in sides:
        assert offset == end
        assert offset % 4 == 0
        end += layout.archive_format.side_bytes * layout.archive_block // 32
    assert end <= layout.archive_page_bytes < end + 16 * layout.archive_block
    assert layout.archive_page_bytes % 512 == 0


@pytest.mark.parametrize(
    ("kept", "widths"),
    [
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
    head = CacheLayout((kept,), 256, 2, 64).heads[0]
    assert [chunk.width for chunk in head.k_chunks] == widths


def test_offsets_of_a_page_in_literal_numbers():
    layout = CacheLayout((48, 0, 16), 128, 2, 64)
    first, second, third = layout.heads
    assert [(c.offset, c.width, c.first) for c in first.k_chunks] == [(0, 32, 0), (2048, 16, 32)]
    assert first.v_offset == 3072
    assert second is None
    assert [(c.offset, c.width, c.first) for c in third.k_chunks] == [(11264, 16, 0)]
    assert third.v_offset == 12288
    assert layout.archive_page_bytes == 20480 * 2
    assert layout.window_page_bytes == 3 * 32 * 2 * 128 * 2


def test_offsets_of_an_fp8_page_in_literal_numbers():
    """Beside K and V of a head: for each of 2 granules a scale of K and one of V."""
    layout = CacheLayout((112, 0, 16), 128, 2, 64, FP8)
    first, second, third = layout.heads
    assert [(c.offset, c.width, c.first) for c in first.k_chunks] == [
        (0, 64, 0), (4096, 32, 64), (6144, 16, 96)
    ]  # fmt: skip
    assert (first.v_offset, first.side_offset) == (7168, 24576)
    assert second is None
    assert [(c.offset, c.width, c.first) for c in third.k_chunks] == [(15360, 16, 0)]
    assert (third.v_offset, third.side_offset) == (16384, 24592)
    assert layout.archive_page_bytes == 64 * 400
    assert layout.window_page_bytes == 3 * 32 * 2 * 128 * 2


@pytest.mark.parametrize(
    ("kept", "archive_format", "token_bytes"),
    [
        ((48, 0, 16), NATIVE, 640),
        ((48, 0, 16), FP8, 320 + 16),
        ((16,) * 8, FP8, 1152 + 16),
        ((0, 0), FP8, 0),
    ],
)
def test_bytes_of_a_token_come_in_units_and_include_side_data(kept, archive_format, token_bytes):
    assert archive_token_bytes(kept, 128, 2, archive_format) == token_bytes


def test_layers_compile_kernels_for_the_counts_of_all_layers():
    assert CacheLayout((64, 0, 32, 64), 128, 2, 64).counts == (32, 64)
    assert CacheLayout((64,), 128, 2, 64, counts=(32, 64, 96)).counts == (32, 64, 96)
    with pytest.raises(ValueError, match=r"heads keep \[48\] channels, not only \(32, 64\)"):
        CacheLayout((48,), 128, 2, 64, counts=(32, 64))


def test_a_head_with_too_many_channels_is_refused():
    with pytest.raises(ValueError, match="288 channels of a head are more than 256"):
        CacheLayout((32,), 288, 2, 64)
