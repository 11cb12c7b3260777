"""Over how many programs decode cuts what a request reads, found on the device from its length."""

import triton
import triton.language as tl
from vllm_leank.kernels.common import boundary_of, dense_granules

from vllm_leank.core.selection import SHARE_UNITS

SHARE = tl.constexpr(SHARE_UNITS)


@triton.constexpr_function
def _lanes(heads):
    """Places of a vector with one for each head: at least a warp's, so that a sum over them is one
    instruction, whose result the compiler knows to be the same for all threads.
    """
    return max(triton.next_power_of_2(heads), 32)


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
def _reads(
    seq_lens_ptr, exact_until_ptr, i_req, archive_units, split_units, wave, SINK: tl.constexpr,
    RECENT: tl.constexpr, H: tl.constexpr, DENSE_UNITS: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, SELECTION: tl.constexpr,
):  # fmt: skip
    """What a request reads: its length, the boundary, the numbers of dense granules and of archive
    tiles, and the units that a program should read: `split_units` at least, and in a batch of at
    most `ROWS` requests a `wave`th of what all read, `archive_units` in a tile of all heads.
    """
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
    return length, boundary, n_dense, n_archive, split_units


@triton.jit
def _splits(
    n_archive, n_dense, head_units, split_units, most, DENSE_UNITS: tl.constexpr,
    WINDOW_COST: tl.constexpr,
):  # fmt: skip
    """Into how many parts heads are cut, `most` of them, that read so many archive tiles of
    `head_units` and dense granules: each part has `split_units` at least.
    """
    # In any part as long as a tile and a granule one of them begins.
    split_units = tl.maximum(split_units, tl.maximum(head_units, DENSE_UNITS * WINDOW_COST))
    units = n_archive * head_units + n_dense * DENSE_UNITS
    # A padded row has no part.
    return tl.minimum(most, tl.minimum(tl.maximum(units // split_units, 1), units))


@triton.jit
def share(
    seq_lens_ptr, exact_until_ptr, i_req, splits, head_units, archive_units, split_units,
    wave, SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr, DENSE_UNITS: tl.constexpr,
    WINDOW_COST: tl.constexpr, TILE: tl.constexpr, UNIT_TILE: tl.constexpr,
    ROWS: tl.constexpr, SELECTION: tl.constexpr,
):  # fmt: skip
    """Of few requests: what one KV head of a request reads, and over how many of its `splits`
    programs, so that each has as much to do as those of other heads and requests (`_reads`).

    Units are 256 bytes; `head_units` are those of `UNIT_TILE` tokens of the head, `archive_units`
    of all heads, and `DENSE_UNITS` those of a dense granule of one. Returns the length, the
    boundary, the numbers of archive tiles and of dense granules, the units of one of these tiles,
    and the programs. Parts are APART as in `cut`.
    """
    tl.static_assert(TILE % UNIT_TILE == 0)
    head_units *= TILE // UNIT_TILE
    length, boundary, n_dense, n_archive, split_units = _reads(
        seq_lens_ptr, exact_until_ptr, i_req, archive_units * (TILE // UNIT_TILE), split_units,
        wave, SINK, RECENT, H, DENSE_UNITS, TILE, ROWS, SELECTION,
    )  # fmt: skip
    n_archive = tl.where(head_units > 0, n_archive, 0)
    splits = _splits(n_archive, n_dense, head_units, split_units, splits, DENSE_UNITS, WINDOW_COST)
    return length, boundary, n_archive, n_dense, head_units, splits


@triton.jit
def share_of_heads(
    seq_lens_ptr, exact_until_ptr, i_req, programs, work_ptr, archive_units, split_units,
    wave, SINK: tl.constexpr, RECENT: tl.constexpr, H: tl.constexpr, DENSE_UNITS: tl.constexpr,
    WINDOW_COST: tl.constexpr, TILE: tl.constexpr, UNIT_TILE: tl.constexpr,
    ROWS: tl.constexpr, SELECTION: tl.constexpr,
):  # fmt: skip
    """Of many requests: over how many programs of a request each row of `Work.programs` goes, the
    first rows over its first programs. As `share`, but parts are not APART, so each has a tile or a
    granule, and a request that would need more than its `programs` has larger parts.

    Returns the length, the boundary, the numbers of archive tiles and of dense granules of a head
    that stores something, and for each row, in vectors of `_lanes(H)`: its number, the units of an
    archive tile, its programs, and the sum of these and of those of all rows before.
    """
    tl.static_assert(TILE % UNIT_TILE == 0)
    length, boundary, n_dense, n_archive, split_units = _reads(
        seq_lens_ptr, exact_until_ptr, i_req, archive_units * (TILE // UNIT_TILE), split_units,
        wave, SINK, RECENT, H, DENSE_UNITS, TILE, ROWS, SELECTION,
    )  # fmt: skip
    o_row = tl.arange(0, _lanes(H))
    m_row = o_row < H
    units = tl.load(work_ptr + 9 * o_row + 7, mask=m_row, other=0) * (TILE // UNIT_TILE)
    # Heads with less than a part have one program each, and all others together have no more than
    # parts: `H` - 1 more programs than parts are enough.
    of_request = tl.sum(units, 0) * n_archive + n_dense * (H * DENSE_UNITS)
    split_units = tl.maximum(split_units, tl.cdiv(of_request, programs - (H - 1)))
    tiles = tl.where(units > 0, n_archive, 0)
    dense = tl.where(m_row, n_dense, 0)
    splits = _splits(tiles, dense, units, split_units, programs, DENSE_UNITS, WINDOW_COST)
    splits = tl.minimum(splits, tl.maximum(tiles, dense))
    return length, boundary, n_archive, n_dense, o_row, units, splits, tl.cumsum(splits, 0)


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
