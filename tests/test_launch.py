"""How kernels are launched: pure functions."""

from dataclasses import replace

import pytest
import torch
from archive_definition import PACKED, profiles_for
from vllm_leank.kernels.channels import first_channels
from vllm_leank.kernels.launch import (
    Device,
    choose_decode,
    choose_extend,
    combined_splits,
    compact_programs,
    decode_kinds,
    programs_of_any_few,
    tile_tokens,
)
from vllm_leank.kernels.tables import Tables, deal, head_costs, share_programs

from vllm_leank.core.formats import NATIVE, known_formats
from vllm_leank.core.pages import CacheLayout
from vllm_leank.core.profile import Profile, whole_heads
from vllm_leank.core.window import Window

HOPPER, AMPERE = Device(tma=True), Device(tma=False)


def layout(kept=(32, 64, 0, 96), block=64, archive_format=NATIVE):
    (profiles,) = profiles_for(archive_format, [kept], 128)
    return CacheLayout(profiles, 128, 2, block, archive_format)


@pytest.mark.parametrize(
    ("heads", "long"),
    [
        ([(0, 128, 0, 128)], True),  # 4 bits
        ([(0, 64, 64, 128), (0, 128, 0, 128)], True),
        ([(0, 0, 128, 128)], True),  # 2 and 4 bits
        ([(0, 0, 128, 64)], False),
        ([(0, 128, 0, 128), (0, 0, 128, 64)], False),
        ([(0, 128, 0, 128), (128, 0, 0, 128)], False),  # 8 and 4 bits
    ],
)
def test_codes_of_a_few_bits_take_long_tiles_where_all_heads_have_them(heads, long):
    """K of 8, 4 and 2 bits, and V of 4."""
    profiles = tuple(Profile(k8=k8, k4=k4, k2=k2, v4=v4) for k8, k4, k2, v4 in heads)
    packed = CacheLayout(profiles, 128, 2, 128, PACKED)
    one, few, many = (choose_decode(rows, packed, HOPPER) for rows in (1, 16, 256))
    assert (one.tile, one.registers) == ((128, None) if long else (64, 192))
    assert (few.tile, few.registers) == ((128, None) if long else (64, 128))
    assert (many.registers is None) == long
    assert (one.stages, few.stages, many.stages) == (3, 3, 2 if long else 3)
    # One request waits for each granule of its window.
    assert one.window_tile == 32 == 2 * many.window_tile


@pytest.mark.parametrize(
    ("heads", "long"),
    [
        ([(64, 64, 64), (32, 64, 128)], True),
        ([(0, 128, 128)], True),
        ([(0, 64, 64)], False),  # 1 bit
        ([(64, 64, 64), (0, 64, 64)], False),
        ([(64, 64, 64), (128, 0, 128)], False),  # 3 bits
    ],
)
def test_many_requests_of_two_bits_take_long_tiles(heads, long):
    """K of 4 and 2 bits, and V of 2. Units of work are those of a short tile all the same."""
    profiles = tuple(Profile(k4=k4, k2=k2, v2=v2) for k4, k2, v2 in heads)
    packed = CacheLayout(profiles, 128, 2, 256, PACKED)
    one, few, many = (choose_decode(rows, packed, HOPPER) for rows in (1, 2, 256))
    assert (one.tile, one.registers) == (64, 192)
    assert (few.tile, few.registers) == (64, 128)
    assert (many.tile, many.registers) == ((128, 160) if long else (64, 128))
    assert tile_tokens(packed) == 64
    selects = choose_decode(256, packed, HOPPER, selects=True)
    assert (selects.tile, selects.registers) == (64, 128)
    # Heads of 256 channels take two warps, so a wave fills multiprocessors.
    wide = replace(packed, head_dim=256)
    assert choose_decode(1, wide, HOPPER)[1:] == choose_decode(1, wide, HOPPER, selects=True)[1:]
    assert choose_decode(1, wide, HOPPER).registers == 128


OF_HEADS = {
    "whole": (NATIVE, Profile(k16=48, v16=128)),
    "4 bits": (PACKED, Profile(k4=128, v4=128)),
    "2 bits": (PACKED, Profile(k2=128, v2=128)),
    "1 bit": (PACKED, Profile(k2=64, v2=64)),
}


@pytest.mark.parametrize("kind", OF_HEADS)
@pytest.mark.parametrize("heads", [1, 2, 4, 8, 32, 96])
def test_every_batch_has_programs_for_each_head(kind, heads):
    """Few have a table that was made at startup, as no tensor may come while a graph is made."""
    archive_format, profile = OF_HEADS[kind]
    alike = CacheLayout((profile,) * heads, 128, 2, 256, archive_format)
    made = programs_of_any_few(heads, choose_decode(1, alike, HOPPER).wave)
    assert len(made) < 10
    for rows in [*range(1, 300), 1000, 1024, 4096]:
        for selects in (False, True):
            launch = choose_decode(rows, alike, HOPPER, selects)
            assert launch.programs in made or not launch.few
            parts = 1 if launch.few else max(launch.wave // (rows * heads), 1)
            assert launch.programs >= heads * parts + (not launch.few) * (heads - 1)


@pytest.mark.parametrize("kind", OF_HEADS)
@pytest.mark.parametrize("heads", [3, 8, 10])
def test_some_numbers_of_requests_stand_for_all(kind, heads):
    archive_format, profile = OF_HEADS[kind]
    alike = CacheLayout((profile,) * heads, 128, 2, 256, archive_format)
    for selects in (False, True):
        found = decode_kinds(256, alike, HOPPER, selects)
        assert len(found) < 12
        stood = {choose_decode(rows, alike, HOPPER, selects).prepared for rows in found}
        assert len(stood) == len(found)
        for rows in range(1, 257):
            launch = choose_decode(rows, alike, HOPPER, selects)
            assert launch.prepared in stood


@pytest.mark.parametrize("kind", OF_HEADS)
def test_programs_of_a_launch_fill_waves_and_do_not_flood_the_gpu(kind):
    archive_format, profile = OF_HEADS[kind]
    alike = CacheLayout((profile,) * 8, 128, 2, 256, archive_format)
    for rows in range(1, 257):
        launch = choose_decode(rows, alike, HOPPER)
        assert rows * launch.programs <= max(8192, launch.wave + rows * 7)
        if launch.few:
            assert launch.wave <= rows * launch.programs <= 2 * launch.wave
        else:
            # In a batch of equal requests most of what it is cut into is there.
            assert 0.66 * launch.wave < launch.wave // (8 * rows) * 8 * rows


PAGES = [
    pytest.param(one, block, id=f"{one.name}-{block}")
    for one in known_formats()
    for block in one.blocks
]
"""Pages that formats have."""


@pytest.mark.parametrize(("archive_format", "block"), PAGES)
def test_tiles_divide_pages(block, archive_format):
    tile = tile_tokens(layout(block=block, archive_format=archive_format))
    assert block % tile == 0
    assert tile & (tile - 1) == 0
    assert 32 <= tile <= 128


@pytest.mark.parametrize(("archive_format", "block"), PAGES)
@pytest.mark.parametrize("device", [HOPPER, AMPERE])
@pytest.mark.parametrize("group", [1, 7, 200])
def test_programs_of_extend_hold_whole_groups_and_tiles_divide_pages(
    block, archive_format, device, group
):
    chosen = choose_extend(group, layout(block=block, archive_format=archive_format), device)
    assert group <= chosen.rows == 1 << (chosen.rows.bit_length() - 1)
    assert block % chosen.tile == 0
    assert chosen.tma == device.tma


@pytest.mark.parametrize(
    ("programs", "heads", "combined"),
    [(16, 8, 16), (64, 8, 32), (256, 8, 32), (512, 8, 64), (1024, 8, 128), (1024, 1, 128)],
)
def test_splits_of_a_head_are_combined_at_once(programs, heads, combined):
    assert combined_splits(programs, heads) == combined


def test_heads_of_many_channels_get_programs_that_fit():
    """Into the shared memory of Hopper, which the queries, K and V of 256 channels would fill."""
    wide = CacheLayout(*whole_heads([[240]], 256), 256, 2, 64)
    assert replace(choose_extend(4, wide, AMPERE), tma=True) == choose_extend(4, wide, HOPPER)
    assert choose_extend(4, wide, HOPPER) != choose_extend(4, layout(), HOPPER)


def test_the_launch_depends_on_the_batch_and_the_device_alone():
    few, many = choose_decode(16, layout(), HOPPER), choose_decode(64, layout(), HOPPER)
    assert few == choose_decode(16, layout(), HOPPER)
    assert few.split_bytes < many.split_bytes
    assert few.rows == many.rows == 128
    assert [choose_decode(rows, layout(), HOPPER).rows for rows in (129, 256, 257)] == [256, 256, 0]
    assert (few.few, many.few) == (True, False)
    assert few.tma
    assert not choose_decode(16, layout(), AMPERE).tma


@pytest.mark.parametrize("costs", [[1.0], [1.0, 1.0, 1.0], [1, 5, 10, 2], [1, 100, 1, 1]])
@pytest.mark.parametrize("programs", [4, 16, 77])
def test_programs_go_to_the_heads_with_most_work(costs, programs):
    counts = share_programs(costs, programs)
    assert sum(counts) == programs
    assert min(counts) >= 1
    loads = [cost / count for cost, count in zip(costs, counts, strict=True)]
    # Nobody has so much that one program more elsewhere would have been better given to him.
    for cost, count, load in zip(costs, counts, loads, strict=True):
        if count > 1:
            assert cost / (count - 1) >= max(loads) or load == max(loads)


@pytest.mark.parametrize("window", [Window(64, 256), Window(64, 8192), Window(64, 1 << 20)])
def test_who_stores_more_costs_more_whatever_the_window(window):
    costs = head_costs(layout((64, 0, 96, 0)), window)
    assert costs[1] == costs[3] < costs[0] < costs[2]


@pytest.mark.parametrize("multiprocessors", [1, 24])
def test_work_tables_name_every_split_once(monkeypatch, multiprocessors):
    monkeypatch.setattr(Device, "of", lambda device: Device(False, multiprocessors))
    kept = (32, 64, 0, 96)
    heads = first_channels(layout(kept)).heads
    tables = Tables(layout(kept), heads, Window(128, 768), torch.device("cpu"))
    launches = [choose_decode(rows, layout(kept), HOPPER) for rows in (1, 4, 32, 64)]
    for launch in launches:
        work = tables.work(launch)
        programs = launch.programs if launch.few else len(kept)
        assert len(work.programs) == programs
        placed = sorted(work.programs.tolist(), key=lambda row: row[3])
        assert [row[3] for row in placed] == list(range(programs))
        lone = launch.few and launch.programs >= 256
        assert (lone and multiprocessors > 1) or placed == work.programs.tolist()
        for head, (first, count, units) in enumerate(work.heads.tolist()):
            rows = placed[first : first + count]
            assert [row[:3] for row in rows] == [[head, i, count] for i in range(count)]
            assert all(row[4:] == tables.heads[head].tolist() for row in rows)
            # Units of 256 bytes: 64 tokens of K and V in 16 bits.
            assert units == (kept[head] and (kept[head] + 128) * 64 * 2 // 256)
        # The streaming head reads least.
        assert not launch.few or work.heads[:, 1].argmin() == 2
    assert tables.variants == (32, 64, 96)
    assert tables.columns[:, 0].tolist() == [*range(32), *range(64), *range(96)]


def test_a_multiprocessor_has_programs_of_one_profile():
    """One has two where one profile ends and the next begins: there are three profiles, so two."""
    variants = [7] * 300 + [5] * 200 + [9] * 156 + [0] * 16
    order = deal(variants, 132)
    assert sorted(order) == list(range(len(variants)))
    storing = order[: 300 + 200 + 156]
    assert all(variants[i] for i in storing)
    kinds = [{variants[i] for i in storing[first::132]} for first in range(132)]
    assert sum(len(one) > 1 for one in kinds) <= 2


@pytest.mark.parametrize("rows", [1, 7, 64, 1024])
def test_compaction_has_programs_for_long_prompts_but_not_too_many(rows):
    decode, prefill = (compact_programs(rows, 8, max_query_len) for max_query_len in (1, 2048))
    assert 1 <= decode <= prefill <= 64
    assert rows * 8 * decode <= max(1024, rows * 8)
    assert rows * 8 * prefill <= max(32768, rows * 8)
    assert prefill == 64 or rows > 32


@pytest.mark.parametrize("kept", [(32, 64), (0, 0)])
def test_tables_are_the_same_whatever_the_default_dtype(kept):
    """Kernels are compiled while vLLM loads a model, under the model's dtype, for what they get
    when it serves.
    """
    torch.set_default_dtype(torch.bfloat16)
    try:
        heads = first_channels(layout(kept)).heads
        tables = Tables(layout(kept), heads, Window(128, 768), torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert tables.numbers.dtype == torch.float32
    assert tables.heads.dtype == tables.order.dtype == tables.columns.dtype == torch.int32
