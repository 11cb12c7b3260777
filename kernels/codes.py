"""Device functions that read codes of 8, 4 or 2 bits out of bytes.

A code becomes an fp16 number without conversion: its bits are those of the number. Codes are
below 1,024, so these numbers are subnormal, `code * 2^-24`, and exact; a code that lies `s` bits up
is read as it lies, as `code * 2^(s - 24)`. The powers of two go into what the codes are multiplied
by. So one AND reads a code from each half of a word, in the lower byte; for the upper bytes, all
parts of them share one shift. Rows of 16 bytes are read four bytes at a time: the first and third,
then the second and fourth.
"""

import triton
import triton.language as tl
from vllm_leank.kernels.pages import load_tile

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
def stored_values(variant):
    """Channels of V with any bits."""
    return sum(row_bytes(variant, 3 + c) << c for c in range(3))


@triton.constexpr_function
def lead_field(variant):
    """The first field of K that a head has: the channels that have most bits."""
    return next(field for field in range(3) if row_bytes(variant, field))


@triton.constexpr_function
def first_part(variant, field):
    """Parts of bytes, one code of each, in the fields of V before this one."""
    return sum(1 << (f % 3) for f in range(field // 3 * 3, field) if row_bytes(variant, f))


@triton.constexpr_function
def first_product(variant, field):
    """Products with queries, one for each part of bytes and lane, in the fields of K before."""
    return sum(lanes(variant, f) << f for f in range(field) if row_bytes(variant, f))


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
def lanes(variant, field):
    """Into how many products a row's bytes go: two, of even and of odd bytes, or one where a row of
    K is too short. Rows of V are as long as a page.
    """
    return 1 if field < 3 and row_bytes(variant, field) < 32 else 2


@triton.constexpr_function
def shift(bits, part, lane):
    """How far up a code is read: part `part` of bytes of so many bits, in byte `lane` of two. The
    upper byte would leave the ten bits of a subnormal number; it is read six bits lower.
    """
    return bits * part + 2 * lane


@triton.constexpr_function
def code_mask(bits, part, lane):
    """What cuts a code out of its byte, or half of a word."""
    return ((1 << bits) - 1) << shift(bits, part, lane)


@triton.constexpr_function
def bytes_asm(bits, part):
    """PTX that makes four fp16 numbers of four bytes: of the first, third, second and fourth."""
    lower, upper = (f"0x{code_mask(bits, part, lane) * 0x00010001:08x}" for lane in range(2))
    return f"{{ .reg .b32 t; and.b32 $0, $2, {lower}; shr.u32 t, $2, 6; and.b32 $1, t, {upper}; }}"


@triton.constexpr_function
def halves_asm(mask, lane):
    """PTX that makes two fp16 numbers of two halves of a word."""
    mask = f"0x{mask * 0x00010001:08x}"
    if lane == 0:
        return f"and.b32 $0, $1, {mask};"
    return f"{{ .reg .b32 t; shr.u32 t, $1, 6; and.b32 $0, t, {mask}; }}"


@triton.jit
def values_of(variant):
    """`stored_values` of a variant that only the device knows."""
    return (variant >> 15 & 31) * 16 + (variant >> 20 & 31) * 32 + (variant >> 25 & 31) * 64


@triton.jit
def product_bytes(W: tl.constexpr, LANE: tl.constexpr, LANES: tl.constexpr):
    """The bytes of a row of `W` that a lane's products take, in order, `[W / LANES]`."""
    o_w = tl.arange(0, W // LANES)
    if LANES == 2:
        return 2 * o_w + LANE
    return swap_bytes(o_w)


@triton.jit
def swap_bytes(o_w):
    """Of four bytes the second for the third, and the third for the second."""
    return o_w // 4 * 4 + o_w % 2 * 2 + o_w % 4 // 2


@triton.jit
def product_powers(
    W: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr, LANE: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """What codes are multiplied by as they are read, a power of two for each of `product_bytes`."""
    o_w = tl.arange(0, W // LANES)
    if LANES == 2:
        return tl.full(o_w.shape, power(shift(BITS, PART, LANE)), tl.float32)
    return tl.where(o_w % 4 < 2, power(shift(BITS, PART, 0)), power(shift(BITS, PART, 1)))


@triton.jit
def read_codes(x, BITS: tl.constexpr, PART: tl.constexpr, LANE: tl.constexpr, ASM: tl.constexpr):
    """Part `PART` of bytes `x` of `8 / BITS` codes each, in the order of `product_bytes`, or of
    bytes `LANE` of halves of words `x`, as fp16 numbers: the code times `2^(shift - 24)`.

    Of bytes, threads must hold four neighbours of a row together, as operands of products do: the
    compiler takes what is done to them for elementwise, though two of them change places.
    """
    MASK: tl.constexpr = code_mask(BITS, PART, LANE)
    if x.dtype == tl.uint8:
        if ASM:
            y = tl.inline_asm_elementwise(
                bytes_asm(BITS, PART), "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4
            )
        else:
            W: tl.constexpr = x.shape[1]
            x = tl.permute(tl.reshape(x, (x.shape[0], W // 4, 2, 2)), (0, 1, 3, 2))
            y = (tl.reshape(x, (x.shape[0], W)) & MASK).to(tl.float32) * (2.0**-24)
            y *= product_powers(W, BITS, PART, 0, 1)[None, :] / power(shift(BITS, PART, 0))
            y = y.to(tl.float16)
    elif ASM:
        y = tl.inline_asm_elementwise(
            halves_asm(MASK, LANE), "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        y = ((x >> (6 * LANE)) & MASK).to(tl.float32) * (2.0**-24)
        y = y.to(tl.float16)
    return y


@triton.jit
def load_field(
    descs, ptr, page, offset, slot, stride_page, VARIANT: tl.constexpr, FIELD: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile of one field of a head that begins `offset` bytes into the page: of K `[TILE, bytes]`,
    of V `[bytes, TILE]`, or with two `lanes` half as many columns, of halves of words.

    Rows of K are short and follow each other, so threads load them together; the tensor memory
    accelerator would take one row at a time, and programs would wait for it.
    """
    W: tl.constexpr = row_bytes(VARIANT, FIELD)
    LANES: tl.constexpr = lanes(VARIANT, FIELD)
    first = (offset + field_offset(VARIANT, FIELD, BLOCK)) // LANES
    if LANES == 2:
        ptr = ptr.to(tl.pointer_type(tl.uint16))
        first = tl.multiple_of(first, 8)
    if FIELD < 3:
        tile = load_tile(
            None, ptr, page, first, slot, 0, stride_page // LANES, W // LANES,
            TILE, W // LANES, TILE, W // LANES, False,
        )  # fmt: skip
    else:
        column = tl.multiple_of(slot // LANES, TILE // LANES)
        tile = load_tile(
            descs[width_index(W)], ptr, page, first, 0, column, stride_page // LANES,
            BLOCK // LANES, W, TILE // LANES, W, TILE // LANES, TMA,
        )  # fmt: skip
    return tile


@triton.jit
def turn_rows(acc, places, y, FIRST: tl.constexpr):
    """Add columns `y` `[M, R]` to columns of `acc` `[M, D]`: column `d` gets that of
    `places[d] - FIRST`, if there is one. `places` `[D]` are where channels stand in stored order.
    """
    R: tl.constexpr = y.shape[1]
    place = places - FIRST
    index = tl.broadcast_to(tl.minimum(tl.maximum(place, 0), R - 1)[None, :], acc.shape)
    return acc + tl.where(((place >= 0) & (place < R))[None, :], tl.gather(y, index, 1), 0.0)
