"""How decode's programs divide what a head of a request reads: `kernels/shares.py`."""

import random

import pytest
import torch
import triton
import triton.language as tl
from test_kernels import DEVICE
from vllm_leank.kernels.shares import cut, share, share_of_heads

SINK, RECENT, TILE, HEADS = 64, 96, 64, 2


@triton.jit
def _cuts(
    out_ptr, n_archive, n_dense, head_units, splits, DENSE_UNITS: tl.constexpr, APART: tl.constexpr
):
    for split in range(splits + 1):
        tile, granule = cut(split, splits, n_archive, n_dense, head_units, DENSE_UNITS, APART)
        tl.store(out_ptr + 2 * split, tile)
        tl.store(out_ptr + 2 * split + 1, granule)


@triton.jit
def _share(
    out_ptr, lengths_ptr, prompts_ptr, splits, head_units, archive_units, split_units, wave,
    SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr, DENSE_UNITS: tl.constexpr,
    WINDOW_COST: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i_req = tl.program_id(0)
    _, _, n_archive, n_dense, _, found = share(
        lengths_ptr, prompts_ptr, i_req, splits, head_units, archive_units, split_units,
        wave, SINK, RECENT, H, DENSE_UNITS, WINDOW_COST, TILE, TILE, ROWS, None,
    )  # fmt: skip
    tl.store(out_ptr + 3 * i_req, found)
    tl.store(out_ptr + 3 * i_req + 1, n_archive)
    tl.store(out_ptr + 3 * i_req + 2, n_dense)


@triton.jit
def _share_of_heads(
    out_ptr, lengths_ptr, prompts_ptr, programs, work_ptr, archive_units, split_units, wave,
    SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr, DENSE_UNITS: tl.constexpr,
    WINDOW_COST: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i_req = tl.program_id(0)
    _, _, n_archive, n_dense, o_row, _, found, ends = share_of_heads(
        lengths_ptr, prompts_ptr, i_req, programs, work_ptr, archive_units, split_units,
        wave, SINK, RECENT, H, DENSE_UNITS, WINDOW_COST, TILE, TILE, ROWS, None,
    )  # fmt: skip
    out_ptr += (2 * H + 2) * i_req
    tl.store(out_ptr, n_archive)
    tl.store(out_ptr + 1, n_dense)
    tl.store(out_ptr + 2 + o_row, found, mask=o_row < H)
    tl.store(out_ptr + 2 + H + o_row, ends, mask=o_row < H)


def share_heads(lengths, units, programs, split_units, wave, dense_units, cost=1, rows=128):
    """Of each request: archive tiles and dense granules, programs of each head, and their sums."""
    count, heads = len(lengths), len(units)
    work = torch.zeros((heads, 9), dtype=torch.int32)
    work[:, 7] = torch.tensor(units, dtype=torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    found = torch.full((count, 2 * heads + 2), -1, dtype=torch.int32, device=DEVICE)
    _share_of_heads[(count,)](
        found, seq_lens, (seq_lens - 1).clamp(min=0), programs, work.to(DEVICE), sum(units),
        split_units, wave, SINK, RECENT, heads, dense_units, cost, TILE, rows,
    )  # fmt: skip
    return found.cpu().split((1, 1, heads, heads), 1)


@pytest.mark.parametrize(
    ("n_archive", "n_dense", "head_units"),
    [(2038, 11, 16), (100, 11, 8), (40, 10, 66), (1, 11, 200), (0, 7, 0), (0, 1, 16), (3, 1, 1)],
)
def test_parts_are_of_equal_size_and_leave_nothing_out(n_archive, n_dense, head_units):
    dense_units = 64
    units = n_archive * head_units + n_dense * dense_units
    most = max(units // max(head_units, dense_units), 1)
    for splits in {min(one, most) for one in (1, 2, 3, most // 2 + 1, most)}:
        cuts = torch.full((splits + 1, 2), -1, dtype=torch.int32, device=DEVICE)
        _cuts[(1,)](cuts, n_archive, n_dense, head_units, splits, dense_units, True)
        assert cuts[0].tolist() == [0, 0]
        assert cuts[-1].tolist() == [n_archive, n_dense]
        parts = cuts.diff(dim=0)
        assert (parts >= 0).all()
        # Each has something to do, and no more than one has some of both.
        assert (parts.sum(1) > 0).all()
        assert (parts > 0).all(1).sum() <= 1
        sizes = parts[:, 0] * head_units + parts[:, 1] * dense_units
        assert (sizes - units / splits).abs().max() < max(head_units, dense_units) + 1


def test_parts_with_some_of_both():
    cuts = torch.full((5, 2), -1, dtype=torch.int32, device=DEVICE)
    _cuts[(1,)](cuts, 10, 7, 16, 4, 64, False)
    assert cuts.tolist() == [[0, 0], [2, 1], [5, 3], [7, 5], [10, 7]]


def test_a_batch_of_few_is_cut_into_equal_parts():
    """Padded rows get nothing, short requests no more programs than they have work for."""
    lengths = torch.tensor([6000, 0, 700, 40], dtype=torch.int32, device=DEVICE)
    head_units, dense_units, wave = 16, 32, 24
    found = torch.zeros((4, 3), dtype=torch.int32, device=DEVICE)
    for rows, split_units in ((128, 1), (0, 100)):
        _share[(4,)](
            found, lengths, lengths - 1, 64, head_units, HEADS * head_units, split_units, wave,
            SINK, RECENT, HEADS, dense_units, 1, TILE, rows,
        )  # fmt: skip
        splits, n_archive, n_dense = found.cpu().unbind(1)
        units = n_archive * head_units + n_dense * dense_units
        assert units.tolist()[1] == splits.tolist()[1] == 0
        least = HEADS * int(units.sum()) // wave if rows else split_units
        assert splits.tolist() == [max(one // least, one > 0) for one in units.tolist()]
        assert not rows or wave - 4 * HEADS < HEADS * splits.sum() <= wave


@pytest.mark.parametrize("rows", [128, 0], ids=["counted", "uncounted"])
@pytest.mark.parametrize("units", [(16,), (16, 16), (40, 16, 16, 4, 0), (200, 1, 1), (3,) * 40])
def test_a_batch_of_many_is_cut_by_what_heads_read(rows, units):
    """Each head has as many programs as it has parts, in turn: heads that read little have few, and
    those of heads that read much follow each other without a gap.
    """
    lengths, dense_units, wave, split_units = [6000, 0, 700, 40, 6000, 9000], 32, 400, 100
    programs = max(wave, 5 * len(units))
    tiles, granules, splits, ends = share_heads(
        lengths, units, programs, split_units, wave, dense_units, rows=rows
    )
    far = tiles * (torch.tensor(units) > 0)
    read = far * torch.tensor(units) + granules * dense_units
    part = max(split_units, int(read.sum()) // wave) if rows else split_units
    sizes = torch.tensor([max(part, dense_units, one) for one in units])
    expected = (read // sizes).clamp(min=1) * (read > 0)
    assert torch.equal(splits, torch.minimum(expected, torch.maximum(far, granules.expand_as(far))))
    assert torch.equal(ends, splits.cumsum(1).int())
    assert not splits[1].any()


def test_no_request_of_many_has_more_parts_than_programs():
    """Whatever its heads read. One that would have more has larger parts."""
    rng = random.Random(0)
    for _ in range(60):
        heads = rng.choice([1, 2, 3, 8, 33])
        units = [rng.choice([0, rng.randint(1, 4), rng.randint(1, 300)]) for _ in range(heads)]
        lengths = [rng.choice([0, rng.randint(1, 600), rng.randint(1, 100_000)]) for _ in range(7)]
        programs = rng.choice([2 * heads - 1, 3 * heads, 100 + heads])
        dense_units, cost = rng.choice([8, 64]), rng.choice([1, 2])
        tiles, granules, splits, ends = share_heads(
            lengths, units, programs, rng.choice([1, 500]), rng.randint(1, 2000), dense_units, cost
        )
        assert (ends <= programs).all()
        assert torch.equal(ends, splits.cumsum(1).int())
        # Each has something to do, and each head of a request a program.
        far = tiles * (torch.tensor(units) > 0)
        assert (splits <= torch.maximum(far, granules.expand_as(far))).all()
        assert torch.equal((splits > 0).all(1), torch.tensor(lengths) > 0)


def test_what_many_requests_read_of_the_same_pages_is_more_than_32_bits_can_count():
    """As each of them counts it, and a part has so many of these units."""
    length, requests, head_units = 1 << 20, 100, 2048
    tiles, _, splits, _ = share_heads(
        [length] * requests, [head_units] * HEADS, 128, 1, 3200, 64, rows=128
    )
    assert int(tiles.sum()) * HEADS * head_units > 1 << 31
    assert splits.tolist() == [[16] * HEADS] * requests
