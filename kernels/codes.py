"""Device functions that read codes of 8, 4 or 2 bits out of bytes.

A code becomes an fp16 number without any arithmetic: its bits are those of the number. Codes are
below 1,024, so these numbers are subnormal, `code * 2^-24`, and exact; a code that lies `s` bits up
in its byte is read as it lies, as `code * 2^(s - 24)`. The powers of two go into what the codes are
multiplied by. That takes one AND and two byte permutations for four codes.
"""

import triton
import triton.language as tl

CODE_UNIT = tl.constexpr(2.0**24)
"""What products of codes, read as fp16, have to be multiplied by."""


@triton.constexpr_function
def row_bytes(variant, field):
    """Bytes of a row of one field of a head, by `variant_of`: K of 8, 4 and 2 bits, then V."""
    return (variant >> (5 * field) & 31) * 16


@triton.constexpr_function
def first_channel(variant, field):
    """Channels of K, or of V, in the fields before this one."""
    return sum(row_bytes(variant, f) << (f % 3) for f in range(field // 3 * 3, field))


@triton.constexpr_function
def first_part(variant, field):
    """Parts of bytes, one code of each, in the fields of K, or of V, before this one."""
    return sum(1 << (f % 3) for f in range(field // 3 * 3, field) if row_bytes(variant, f))


@triton.constexpr_function
def field_offset(variant, field, block):
    """Bytes of a head's fields before this one, in pages of `block` tokens."""
    return block * sum(row_bytes(variant, f) for f in range(field))


@triton.constexpr_function
def width_index(width):
    """Of a width among 16, 32, 64, 128 and 256."""
    return max(width, 16).bit_length() - 5


@triton.constexpr_function
def power(exponent):
    """A power of two, as a float."""
    return 2.0**exponent


@triton.constexpr_function
def unpack_asm(mask):
    """PTX that makes four fp16 numbers of four bytes, each of which `mask` cuts a code out of."""
    if mask == 0xFF:
        return "prmt.b32 $0, $2, 0, 0x4140; prmt.b32 $1, $2, 0, 0x4342;"
    return (
        f"{{ .reg .b32 t; and.b32 t, $2, 0x{mask * 0x01010101:08x};"
        " prmt.b32 $0, t, 0, 0x4140; prmt.b32 $1, t, 0, 0x4342; }"
    )


@triton.jit
def read_codes(x, BITS: tl.constexpr, PART: tl.constexpr, ASM: tl.constexpr):
    """Part `PART` of bytes `x` of `8 / BITS` codes each, as fp16 numbers: the code times
    `2^(BITS * PART - 24)`.
    """
    MASK: tl.constexpr = ((1 << BITS) - 1) << (BITS * PART)
    if ASM:
        y = tl.inline_asm_elementwise(
            unpack_asm(MASK), "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        y = ((x & MASK).to(tl.float32) * (2.0**-24)).to(tl.float16)
    return y


@triton.jit
def turn(acc, places, y, FIRST: tl.constexpr):
    """Add rows `y` `[R, N]` to rows of `acc` `[D, N]`: row `d` gets that of `places[d] - FIRST`, if
    there is one. `places` `[D]` are where channels stand in stored order.
    """
    R: tl.constexpr = y.shape[0]
    place = places - FIRST
    index = tl.broadcast_to(tl.minimum(tl.maximum(place, 0), R - 1)[:, None], acc.shape)
    return acc + tl.where(((place >= 0) & (place < R))[:, None], tl.gather(y, index, 0), 0.0)


@triton.jit
def turn_rows(acc, places, y, FIRST: tl.constexpr):
    """Add columns `y` `[M, R]` to columns of `acc` `[M, D]`; see `turn`."""
    R: tl.constexpr = y.shape[1]
    place = places - FIRST
    index = tl.broadcast_to(tl.minimum(tl.maximum(place, 0), R - 1)[None, :], acc.shape)
    return acc + tl.where(((place >= 0) & (place < R))[None, :], tl.gather(y, index, 1), 0.0)
