"""Over how many programs decode cuts what a request reads, found on the device from its length."""

import triton
import triton.language as tl
from vllm_leank.kernels.common import boundary_of, dense_granules

from vllm_leank.core.selection import SHARE_UNITS

SHARE = tl.constexpr(SHARE_UNITS)


@triton.jit
def selected(segments, SELECTION: tl.constexpr):
    """`Selection.count`: of so many far segments, how many are read. `SELECTION` has its
    `share` and `least`.
    """
    wanted = tl.cdiv(segments.to(tl.int64) * SELECTION[0], SHARE).to(tl.int32)
    return tl.minimum(segments, tl.maximum(wanted, SELECTION[1]))


@triton.jit
def _span(
    length, exact_until, SINK: tl.constexpr, RECENT: tl.constexpr, TILE: tl.constexpr,
    SELECTION: tl.constexpr,
):  # fmt: skip
    """What the last query of requests reads: the boundary (`SINK` where all is dense), the number
    of dense granules, and that of archive tiles: of all, or of those that are selected.
    """
    boundary = tl.where(length > exact_until, boundary_of(length, SINK, RECENT), SINK)
    n_dense = dense_granules(length, boundary, SINK)
    n_archive = tl.where(boundary > SINK, tl.cdiv(boundary, TILE) - SINK // TILE, 0)
    if SELECTION is not None:
        n_archive = selected(n_archive, SELECTION)
    return boundary, n_dense, n_archive


@triton.jit
def share(
    seq_lens_ptr, exact_until_ptr, i_req, splits, head_units, archive_units, split_units,
    wave, SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr, DENSE_UNITS: tl.constexpr,
    WINDOW_COST: tl.constexpr, TILE: tl.constexpr, UNIT_TILE: tl.constexpr,
    ROWS: tl.constexpr, FEW: tl.constexpr, SELECTION: tl.constexpr,
):  # fmt: skip
    """What one KV head of a request reads, and over how many of its programs: no more than give
    each `split_units` to read, and, in a batch of at most `ROWS` requests, all of them about `wave`
    of equal size, whatever the lengths. FEW: parts are APART as in `cut`.

    Units are 256 bytes; `head_units` are those of `UNIT_TILE` tokens of the head, `archive_units`
    of all heads, and `DENSE_UNITS` those of a dense granule of one. Returns the length, the
    boundary, the numbers of archive tiles and of dense granules, the units of one of these tiles,
    and the programs.
    """
    tl.static_assert(TILE % UNIT_TILE == 0)
    head_units *= TILE // UNIT_TILE
    archive_units *= TILE // UNIT_TILE
    if ROWS > 0:
        o_row = tl.arange(0, ROWS)
        m_row = o_row < tl.num_programs(0)
        lengths = tl.load(seq_lens_ptr + o_row, mask=m_row, other=0)
        prompts = tl.load(exact_until_ptr + o_row, mask=m_row, other=0)
        _, n_dense, n_archive = _span(lengths, prompts, SINK, RECENT, TILE, SELECTION)
        of_rows = n_dense * (H * DENSE_UNITS) + n_archive * archive_units
        # Many requests may read the same pages, and so more than 32 bits can count. Sums of 64 bits
        # would not do: that all threads have the same one is lost on the compiler.
        high, low = tl.sum(of_rows >> 10, 0), tl.sum(of_rows & 1023, 0)
        part = high // wave * 1024 + (high % wave * 1024 + low) // wave
        split_units = tl.maximum(split_units, part)
    length = tl.load(seq_lens_ptr + i_req)
    exact_until = tl.load(exact_until_ptr + i_req)
    boundary, n_dense, n_archive = _span(length, exact_until, SINK, RECENT, TILE, SELECTION)
    n_archive = tl.where(head_units > 0, n_archive, 0)
    # In any part as long as a tile and a granule one of them begins.
    split_units = tl.maximum(split_units, tl.maximum(head_units, DENSE_UNITS * WINDOW_COST))
    units = n_archive * head_units + n_dense * DENSE_UNITS
    # A padded row has no part.
    splits = tl.minimum(splits, tl.minimum(tl.maximum(units // split_units, 1), units))
    # And where parts have some of both, each has a tile or a granule.
    if not FEW:
        splits = tl.minimum(splits, tl.maximum(n_archive, n_dense))
    return length, boundary, n_archive, n_dense, head_units, splits


@triton.jit
def cut(
    split, splits, n_archive, n_dense, head_units, GRANULE_UNITS: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """The first archive tile and the first dense granule of one of `splits` parts of what a head
    reads. APART: its far tokens come first, then its window, of which a granule takes as long as
    `GRANULE_UNITS` of them; parts take as long, and have what begins in them, so few have some of
    both. Else each part has as many tiles and granules.
    """
    if not APART:
        return n_archive * split // splits, n_dense * split // splits
    far = n_archive * head_units
    units = far + n_dense * GRANULE_UNITS
    each = units // splits
    start = split * each + tl.minimum(split, units - splits * each)
    tile = tl.minimum(tl.cdiv(start, tl.maximum(head_units, 1)), n_archive)
    return tile, tl.cdiv(tl.maximum(start - far, 0), GRANULE_UNITS)


@triton.jit
def after_prompt(seq_lens_ptr, exact_until_ptr, i_req):
    """Whether a request's last query comes after its prompt."""
    return tl.load(seq_lens_ptr + i_req) > tl.load(exact_until_ptr + i_req)
