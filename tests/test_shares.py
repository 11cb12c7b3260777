"""How decode's programs divide what a head of a request reads: `kernels/shares.py`."""

import pytest
import torch
import triton
import triton.language as tl
from test_kernels import DEVICE
from vllm_leank.kernels.shares import cut, share

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
    WINDOW_COST: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    i_req = tl.program_id(0)
    _, _, n_archive, n_dense, _, found = share(
        lengths_ptr, prompts_ptr, i_req, splits, head_units, archive_units, split_units,
        wave, SINK, RECENT, H, DENSE_UNITS, WINDOW_COST, TILE, TILE, ROWS, FEW, None,
    )  # fmt: skip
    tl.store(out_ptr + 3 * i_req, found)
    tl.store(out_ptr + 3 * i_req + 1, n_archive)
    tl.store(out_ptr + 3 * i_req + 2, n_dense)


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


@pytest.mark.parametrize("few", [True, False])
def test_a_batch_is_cut_into_equal_parts(few):
    """Padded rows get nothing, short requests no more programs than they have work for."""
    lengths = torch.tensor([6000, 0, 700, 40], dtype=torch.int32, device=DEVICE)
    head_units, dense_units, wave = 16, 32, 24
    found = torch.zeros((4, 3), dtype=torch.int32, device=DEVICE)
    for rows, split_units in ((128, 1), (0, 100)):
        _share[(4,)](
            found, lengths, lengths - 1, 64, head_units, HEADS * head_units, split_units, wave,
            SINK, RECENT, HEADS, dense_units, 1, TILE, rows, few,
        )  # fmt: skip
        splits, n_archive, n_dense = found.cpu().unbind(1)
        units = n_archive * head_units + n_dense * dense_units
        assert units.tolist()[1] == splits.tolist()[1] == 0
        least = HEADS * int(units.sum()) // wave if rows else split_units
        assert splits.tolist() == [max(one // least, one > 0) for one in units.tolist()]
        assert not rows or wave - 4 * HEADS < HEADS * splits.sum() <= wave


def test_what_many_requests_read_of_the_same_pages_is_more_than_32_bits_can_count():
    """As each of them counts it, and a part has so many of these units."""
    length, requests, head_units = 1 << 20, 100, 2048
    lengths = torch.full((requests,), length, dtype=torch.int32, device=DEVICE)
    found = torch.zeros((requests, 3), dtype=torch.int32, device=DEVICE)
    _share[(requests,)](
        found, lengths, lengths - 1, 64, head_units, HEADS * head_units, 1, 3200,
        SINK, RECENT, HEADS, 64, 1, TILE, 128, False,
    )  # fmt: skip
    splits, n_archive, _ = found.cpu().unbind(1)
    assert int(n_archive.sum()) * HEADS * head_units > 1 << 31
    assert splits.tolist() == [16] * requests
