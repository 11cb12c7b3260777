"""Where every byte of a layer's pages is."""

from dataclasses import replace

import pytest
from archive_definition import PACKED, profiles_for
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_leank.core.formats import NATIVE, known_formats
from vllm_leank.core.formats.whole import CHUNK_WIDTHS
from vllm_leank.core.pages import CacheLayout, archive_token_bytes
from vllm_leank.core.profile import Profile, whole_heads


def layout_of(kept, head_dim, itemsize, block, archive_format=NATIVE, **options):
    (profiles,) = profiles_for(archive_format, [kept], head_dim)
    return CacheLayout(profiles, head_dim, itemsize, block, archive_format, **options)


def drawn_layout(kept, head_dim, itemsize, archive_format, block):
    blocks = archive_format.blocks
    return layout_of(kept, head_dim, itemsize, blocks[block % len(blocks)], archive_format)


counts = st.integers(0, 16).map(lambda n: n * 16)
layouts = st.builds(
    drawn_layout,
    st.lists(counts, min_size=1, max_size=8),
    st.sampled_from([64, 96, 128, 256]),
    st.sampled_from([2, 4]),
    st.sampled_from(known_formats()),
    st.integers(0, 7),
)


@settings(max_examples=300, deadline=None)
@given(layouts)
def test_chunks_values_and_side_data_tile_the_page(layout):
    block, item = layout.archive_block, layout.archive_itemsize
    fields = []
    for profile, head in zip(layout.profiles, layout.heads, strict=True):
        assert (head is None) == (not profile.stores)
        if head is None:
            continue
        for chunks in (head.k_chunks, head.v_chunks):
            ends = [0, *(chunk.first + chunk.width for chunk in chunks)]
            assert [chunk.first for chunk in chunks] == ends[:-1]
        assert all(chunk.width in CHUNK_WIDTHS for chunk in head.k_chunks)
        assert all(chunk.offset % chunk.width == 0 for chunk in head.k_chunks)
        for chunk in (*head.k_chunks, *head.v_chunks):
            fields.append((chunk.offset * item, chunk.width * block * item))
        assert head.side_offset % 4 == 0
        fields.append((head.side_offset, layout.archive_format.side_bytes * block // 32))
    end = 0
    for offset, size in sorted(fields):
        assert offset == end
        end += size
    assert end <= layout.archive_page_bytes < end + 16 * block
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
    head = layout_of((kept,), 256, 2, 64).heads[0]
    assert [chunk.width for chunk in head.k_chunks] == widths


def test_offsets_of_a_page_in_literal_numbers():
    layout = layout_of((48, 0, 16), 128, 2, 64)
    first, second, third = layout.heads
    assert [(c.offset, c.width, c.first) for c in first.k_chunks] == [(0, 32, 0), (2048, 16, 32)]
    assert first.v_offset == 3072
    assert second is None
    assert [(c.offset, c.width, c.first) for c in third.k_chunks] == [(11264, 16, 0)]
    assert third.v_offset == 12288
    assert layout.archive_page_bytes == 20480 * 2
    assert layout.window_page_bytes == 3 * 32 * 2 * 128 * 2


def test_bytes_of_a_packed_page_in_literal_numbers():
    """Of 128 tokens. Head 0: K 32 x 8, 32 x 4, 64 x 2 bits, V 16 x 8, 64 x 4; head 2: V alone."""
    heads = Profile(k8=32, k4=32, k2=64, v8=16, v4=64), Profile(), Profile(v2=64)
    layout = CacheLayout(heads, 128, 2, 128, PACKED)
    first, second, third = layout.heads
    assert [(c.offset, c.width, c.first) for c in first.k_chunks] == [
        (0, 32, 0), (4096, 16, 32), (6144, 16, 48)
    ]  # fmt: skip
    assert [(c.offset, c.width, c.first) for c in first.v_chunks] == [
        (8192, 16, 0),
        (10240, 32, 16),
    ]
    assert first.side_offset == 14336
    assert second is None
    assert third.k_chunks == ()
    assert [(c.offset, c.width, c.first) for c in third.v_chunks] == [(14592, 16, 0)]
    assert third.side_offset == 16640
    # 64 bytes of K, 48 of V and 2 of a scale; 16 and 2; in units of 16.
    assert layout.archive_page_bytes == 128 * 144


def test_bytes_of_a_token_of_llama_at_two_bits():
    """A layer of 8 heads: 4,096 bytes dense."""
    profiles = (Profile(k2=128, v2=128),) * 8
    assert archive_token_bytes(profiles, 2, PACKED) == 8 * (32 + 32 + 2)


@pytest.mark.parametrize(
    "profile",
    [Profile(k16=32, v16=128), Profile(k8=8), Profile(k4=16), Profile(v2=32), Profile(k2=64, v8=8)],
)
def test_no_packed_page_holds_what_does_not_fill_16_bytes(profile):
    assert not PACKED.takes(profile)
    with pytest.raises(ValueError, match="no packed archive can hold K"):
        CacheLayout((profile,), 128, 2, 128, PACKED)


@pytest.mark.parametrize(
    ("kept", "archive_format", "token_bytes"),
    [
        ((48, 0, 16), NATIVE, 640),
        ((48, 0, 16), PACKED, 160),  # 32 and 16 bytes of K, 48 of V and 2 of a scale
        ((0, 0), PACKED, 0),
    ],
)
def test_bytes_of_a_token_come_in_units_and_include_side_data(kept, archive_format, token_bytes):
    (profiles,) = profiles_for(archive_format, [kept], 128)
    assert archive_token_bytes(profiles, 2, archive_format) == token_bytes


def test_layers_compile_kernels_for_the_profiles_of_all_layers():
    (some,) = whole_heads([[32, 64]], 128)
    assert layout_of((64, 0, 32, 64), 128, 2, 64).variants == some
    assert layout_of((64,), 128, 2, 64, variants=some).variants == some
    wrong = "heads store K 48 x 16, V 128 x 16, not only K 32 x 16, V 128 x 16; K 64 x 16"
    with pytest.raises(ValueError, match=wrong):
        layout_of((48,), 128, 2, 64, variants=some)


def test_a_head_with_too_many_channels_is_refused():
    with pytest.raises(ValueError, match="288 channels of a head are more than 256"):
        layout_of((32,), 288, 2, 64)


@pytest.mark.parametrize("tokens", [0, 48])
def test_a_window_page_has_whole_granules(tokens):
    with pytest.raises(ValueError, match=f"window pages have {tokens} tokens, no multiple of 32"):
        replace(layout_of((32,), 64, 2, 64), window_block=tokens)
