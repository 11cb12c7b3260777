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
    how far up the code lies in it, and the largest code; -1 for channels of 0 bits.
    """
    w8, w4, w2 = (widths & 31) * 16, (widths >> 5 & 31) * 16, (widths >> 10 & 31) * 16
    is_8, is_48 = place < w8, place < w8 + 2 * w4
    width = tl.where(is_8, w8, tl.where(is_48, w4, w2))
    before = tl.where(is_8, 0, tl.where(is_48, w8, w8 + w4))
    within = place - tl.where(is_8, 0, tl.where(is_48, w8, w8 + 2 * w4))
    part = within // tl.maximum(width, 1)
    largest = tl.where(is_8, 255, tl.where(is_48, 15, 3))
    largest = tl.where(place < w8 + 2 * w4 + 4 * w2, largest, -1)
    shift = part * tl.where(is_8, 8, tl.where(is_48, 4, 2))
    return width, before, within - part * width, shift, largest


@triton.jit
def _numbers(p_codes, shift, largest, p_factor, place, m_d):
    """Codes of tokens and channels `[TILE, D]` as distances from the channels' means, fp32."""
    stored = m_d & (largest > 0)
    codes = tl.load(p_codes, mask=stored[None, :], other=0).to(tl.int32)
    codes = (codes >> shift[None, :]) & largest[None, :]
    factor = tl.load(p_factor + place, mask=stored, other=0.0)
    return (codes.to(tl.float32) - (largest.to(tl.float32) / 2)[None, :]) * factor[None, :]


@triton.jit
def unpack(
    token, begin, end, filled, head, p_head, order_ptr, numbers_ptr, p_table, archive_ptr, side_ptr,
    stride_page, stride_side, p_key, p_value,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decode `TILE` tokens of a head, from `token` on, of which those from `begin` to `end` are
    wanted; those from there to `filled` become 0.

    `TILE` is a multiple of 64, and divides `token` and `BLOCK`; p_key, p_value: where K and V of
    the token `begin` go, and then `D` elements on for each.
    """
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    variant = tl.load(p_head)
    offset = tl.multiple_of(tl.load(p_head + 2), 16)
    side_offset = tl.load(p_head + 4)
    page = tl.load(p_table + token // BLOCK, mask=token < end, other=0).to(tl.int64)
    p_page = archive_ptr + page * stride_page + offset
    slot = token % BLOCK
    o_row = tl.arange(0, TILE)
    o_token = token + o_row
    wanted = (o_token >= begin) & (o_token < end)

    place = tl.load(order_ptr + (3 * H + head) * D + o_d, mask=m_d, other=0)
    width, before, byte, shift, largest = _fields(variant, place)
    p_codes = p_page + (slot + o_row)[:, None] * width[None, :] + (before * BLOCK + byte)[None, :]
    key = _numbers(p_codes, shift, largest, numbers_ptr + (H + head) * D, place, m_d)
    mean = tl.load(numbers_ptr + (4 * H + head) * D + place, mask=m_d, other=0.0)
    key = tl.where(wanted[:, None], key + mean[None, :], 0.0).to(p_key.dtype.element_ty)
    rows = ((o_token - begin) * D)[:, None] + o_d[None, :]
    m_rows = ((o_token >= begin) & (o_token < filled))[:, None] & m_d[None, :]
    tl.store(p_key + rows, key, mask=m_rows)

    # In rows of V the tokens of two granules alternate.
    o_token = token + o_row // 64 * 64 + o_row % 2 * 32 + o_row % 64 // 2
    wanted = (o_token >= begin) & (o_token < end)
    place = tl.load(order_ptr + (2 * H + head) * D + o_d, mask=m_d, other=0)
    _, before, byte, shift, largest = _fields(variant >> 15, place)
    before += ((variant & 31) + (variant >> 5 & 31) + (variant >> 10 & 31)) * 16
    p_codes = p_page + (slot + o_row)[:, None] + ((before + byte) * BLOCK)[None, :]
    value = _numbers(p_codes, shift, largest, numbers_ptr + (3 * H + head) * D, place, m_d)
    p_scale = side_ptr + page * stride_side + side_offset + slot + (o_token - token)
    value *= tl.load(p_scale, mask=wanted, other=0.0).to(tl.float32)[:, None]
    mean = tl.load(numbers_ptr + (2 * H + head) * D + o_d, mask=m_d, other=0.0)
    value = tl.where(wanted[:, None], value + mean[None, :], 0.0).to(p_value.dtype.element_ty)
    rows = ((o_token - begin) * D)[:, None] + o_d[None, :]
    m_rows = ((o_token >= begin) & (o_token < filled))[:, None] & m_d[None, :]
    tl.store(p_value + rows, value, mask=m_rows)
