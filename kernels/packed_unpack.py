"""Unpacks tiles of packed pages to plain K and V; `codecs.packed` has the same in plain PyTorch.

One kernel serves heads of any profile: it asks for each channel where its codes lie.
"""

import triton
import triton.language as tl


@triton.jit
def _fields(widths, place):
    """Where the codes of channels lie that stand at `place` `[D]` among their head's K, or V, as
    `widths`, fifteen bits of a variant, describes it.

    Returns for each: bytes of a row of its field, bytes of the fields before, its byte in a row,
    how far up the code lies in it, and the largest code. All are 0 for channels of 0 bits, which
    may then be read like others.
    """
    w8, w4, w2 = (widths & 31) * 16, (widths >> 5 & 31) * 16, (widths >> 10 & 31) * 16
    is_8, is_48 = place < w8, place < w8 + 2 * w4
    width = tl.where(is_8, w8, tl.where(is_48, w4, w2))
    before = tl.where(is_8, 0, tl.where(is_48, w8, w8 + w4))
    within = place - tl.where(is_8, 0, tl.where(is_48, w8, w8 + 2 * w4))
    part = within // tl.maximum(width, 1)
    largest = tl.where(is_8, 255, tl.where(is_48, 15, 3))
    shift = part * tl.where(is_8, 8, tl.where(is_48, 4, 2))
    stored = (place < w8 + 2 * w4 + 4 * w2).to(tl.int32)
    byte = within - part * width
    return width * stored, before * stored, byte * stored, shift * stored, largest * stored


@triton.jit
def _distances(p_codes, shift, largest, factor):
    """Codes of tokens and channels `[TILE, D]` as distances from the channels' means, fp32.

    A code becomes a number where it lies: its byte is put into the last 16 bits of the number
    2^15, whose last bit is worth 2^-8.
    """
    found = tl.load(p_codes).to(tl.int32) << 8
    found = (found & (largest << (shift + 8))[None, :]) | 0x47000000
    unit = ((127 + shift) << 23).to(tl.float32, bitcast=True)  # 2^shift
    middle = 32768.0 + largest.to(tl.float32) * 0.5 * unit
    down = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    return (found.to(tl.float32, bitcast=True) - middle[None, :]) * (factor * down)[None, :]


@triton.jit
def _store(
    p_rows, x, o_token, last, begin, end, filled, m_d, D: tl.constexpr, D_PAD: tl.constexpr
):  # fmt: skip
    """Store rows `x` of the tokens `o_token`, which end before `last`: of those from `begin` to
    `end`, and zeros from there to `filled`.
    """
    o_d = tl.arange(0, D_PAD)
    p_rows += ((o_token - begin) * D)[:, None] + o_d[None, :]
    wanted = (o_token >= begin) & (o_token < end)
    tl.store(p_rows, x.to(p_rows.dtype.element_ty), mask=wanted[:, None] & m_d[None, :])
    if last > end:
        empty = (o_token >= end) & (o_token < filled)
        nothing = tl.zeros_like(x).to(p_rows.dtype.element_ty)
        tl.store(p_rows, nothing, mask=empty[:, None] & m_d[None, :])


@triton.jit
def _unpack_keys(
    token, stop, begin, end, filled, variant, head, offset, order_ptr, numbers_ptr, p_table,
    archive_ptr, stride_page, p_key,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    place = tl.load(order_ptr + (3 * H + head) * D + o_d, mask=m_d, other=D)
    width, before, byte, shift, largest = _fields(variant, place)
    mean = tl.load(numbers_ptr + (4 * H + head) * D + place, mask=m_d, other=0.0)
    factor = tl.load(numbers_ptr + (H + head) * D + place, mask=m_d, other=0.0)
    o_row = tl.arange(0, TILE)
    o_code = o_row[:, None] * width[None, :] + (before * BLOCK + byte)[None, :]
    for first in range(token, stop, TILE):
        page = tl.load(p_table + first // BLOCK, mask=first < end, other=0).to(tl.int64)
        p_page = archive_ptr + page * stride_page + offset
        p_codes = p_page + (o_code + (first % BLOCK * width)[None, :])
        key = _distances(p_codes, shift, largest, factor) + mean[None, :]
        _store(p_key, key, first + o_row, first + TILE, begin, end, filled, m_d, D, D_PAD)


@triton.jit
def _unpack_values(
    token, stop, begin, end, filled, variant, head, offset, side_offset, order_ptr, numbers_ptr,
    p_table, archive_ptr, side_ptr, stride_page, stride_side, p_value,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    place = tl.load(order_ptr + (2 * H + head) * D + o_d, mask=m_d, other=D)
    _, before, byte, shift, largest = _fields(variant >> 15, place)
    before += ((variant & 31) + (variant >> 5 & 31) + (variant >> 10 & 31)) * 16
    mean = tl.load(numbers_ptr + (2 * H + head) * D + o_d, mask=m_d, other=0.0)
    factor = tl.load(numbers_ptr + (3 * H + head) * D + place, mask=m_d, other=0.0)
    o_row = tl.arange(0, TILE)
    # In rows of V the tokens of two granules alternate.
    o_slot = o_row // 64 * 64 + o_row % 2 * 32 + o_row % 64 // 2
    o_code = o_row[:, None] + ((before + byte) * BLOCK)[None, :]
    for first in range(token, stop, TILE):
        page = tl.load(p_table + first // BLOCK, mask=first < end, other=0).to(tl.int64)
        p_page = archive_ptr + page * stride_page + offset + tl.multiple_of(first % BLOCK, TILE)
        o_token = first + o_slot
        p_scale = side_ptr + page * stride_side + side_offset + first % BLOCK + o_slot
        # Scales of slots that hold no token may hold anything: such rows are not stored.
        scale = tl.load(p_scale).to(tl.float32)
        value = _distances(p_page + o_code, shift, largest, factor) * scale[:, None]
        value += mean[None, :]
        _store(p_value, value, o_token, first + TILE, begin, end, filled, m_d, D, D_PAD)


@triton.jit
def unpack(
    token, stop, begin, end, filled, kind, head, p_head, order_ptr, numbers_ptr, p_table,
    archive_ptr, side_ptr, stride_page, stride_side, p_key, p_value,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decode tokens `token` to `stop` of a head, of which those from `begin` to `end` are wanted;
    those from there to `filled` become 0.

    `TILE`, a multiple of 64, divides `token`, `stop` and `BLOCK`. kind: 0 for K, 1 for V; p_key,
    p_value: where K and V of the token `begin` go, and then `D` elements on for each.
    """
    variant = tl.load(p_head)
    offset = tl.multiple_of(tl.load(p_head + 2), 16)
    if kind == 0:
        _unpack_keys(
            token, stop, begin, end, filled, variant, head, offset, order_ptr, numbers_ptr, p_table,
            archive_ptr, stride_page, p_key, H, D, D_PAD, TILE, BLOCK,
        )  # fmt: skip
    else:
        _unpack_values(
            token, stop, begin, end, filled, variant, head, offset, tl.load(p_head + 4), order_ptr,
            numbers_ptr, p_table, archive_ptr, side_ptr, stride_page, stride_side, p_value,
            H, D, D_PAD, TILE, BLOCK,
        )  # fmt: skip
