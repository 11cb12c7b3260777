"""Encodes granules into packed pages; `codecs.packed` has the same in plain PyTorch."""

import triton
import triton.language as tl
from vllm_leank.kernels.codes import (
    field_offset,
    first_channel,
    power,
    row_bytes,
    stored_values,
)
from vllm_leank.kernels.pages import page_of, row_of

from vllm_leank.core.formats.packed import LARGEST_SCALE, LEAST_SCALE, STEPS

LEAST = tl.constexpr(LEAST_SCALE)
LARGEST = tl.constexpr(LARGEST_SCALE)
STEPS_OF = tl.constexpr((STEPS[8], STEPS[4], STEPS[2]))


@triton.constexpr_function
def squared_step(steps, c):
    """Of a class, squared."""
    return steps[c] ** 2


@triton.jit
def _steps(p_tokens, p_order, p_mean, p_factor, first, W: tl.constexpr, KEYS: tl.constexpr):
    """Channels `first` to `first + W` of 32 tokens as distances from their means in steps, fp32:
    `[32, W]` of K, `[W, 32]` of V.
    """
    o_w = first + tl.arange(0, W)
    channel = tl.load(p_order + o_w)
    mean = tl.load(p_mean + o_w)
    factor = tl.load(p_factor + o_w)
    inverse = tl.where(factor > 0, tl.div_rn(tl.full([W], 1.0, tl.float32), factor), 0.0)
    if KEYS:
        x = tl.load(p_tokens[:, None] + channel[None, :]).to(tl.float32)
        x = (x - mean[None, :]) * inverse[None, :]
    else:
        x = tl.load(p_tokens[None, :] + channel[:, None]).to(tl.float32)
        x = (x - mean[:, None]) * inverse[:, None]
    return x


@triton.jit
def _codes(steps, BITS: tl.constexpr):
    """Codes of distances, int32."""
    return tl.clamp(tl.floor(steps) + power(BITS - 1), 0.0, power(BITS) - 1).to(tl.int32)


@triton.jit
def _store_keys(
    p_tokens, p_page, slot, p_order, p_mean, p_factor, C: tl.constexpr,
    VARIANT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Encode 32 tokens' channels of one class of K."""
    W: tl.constexpr = row_bytes(VARIANT, C)
    codes = tl.zeros([32, W], tl.int32)
    for part in tl.static_range(1 << C):
        first = first_channel(VARIANT, C) + part * W
        x = _codes(_steps(p_tokens, p_order, p_mean, p_factor, first, W, True), 8 >> C)
        codes |= x << ((8 >> C) * part)
    p_rows = p_page + field_offset(VARIANT, C, BLOCK) + (slot + tl.arange(0, 32))[:, None] * W
    tl.store(p_rows + tl.arange(0, W)[None, :], codes.to(tl.uint8))


@triton.jit
def _square_values(
    p_tokens, p_order, p_mean, p_factor, C: tl.constexpr, VARIANT: tl.constexpr
):  # fmt: skip
    """Sum over one class of V of squared distances in standard deviations, `[32]`."""
    R: tl.constexpr = row_bytes(VARIANT, 3 + C)
    squares = tl.zeros([32], tl.float32)
    for part in tl.static_range(1 << C):
        first = first_channel(VARIANT, 3 + C) + part * R
        x = _steps(p_tokens, p_order, p_mean, p_factor, first, R, False)
        squares += tl.sum(x * x, 0)
    return squares * squared_step(STEPS_OF, C)


@triton.jit
def _store_values(
    p_tokens, p_page, slot, inverse, p_order, p_mean, p_factor, C: tl.constexpr,
    VARIANT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Encode 32 tokens' channels of one class of V, in units of the tokens' scales."""
    R: tl.constexpr = row_bytes(VARIANT, 3 + C)
    codes = tl.zeros([R, 32], tl.int32)
    for part in tl.static_range(1 << C):
        first = first_channel(VARIANT, 3 + C) + part * R
        x = _steps(p_tokens, p_order, p_mean, p_factor, first, R, False)
        codes |= _codes(x * inverse[None, :], 8 >> C) << ((8 >> C) * part)
    # Tokens of two granules alternate.
    p_rows = p_page + field_offset(VARIANT, 3 + C, BLOCK) + slot // 64 * 64 + slot // 32 % 2
    p_rows += tl.arange(0, R)[:, None] * BLOCK
    tl.store(p_rows + 2 * tl.arange(0, 32)[None, :], codes.to(tl.uint8))


@triton.jit
def compact(
    start, stop, step, variant, head, p_head,
    window_ptr, archive_ptr, side_ptr, p_window_table, p_archive_table,
    order_ptr, numbers_ptr, columns_ptr,
    stride_window_page, stride_archive_page, stride_side,
    VARIANTS: tl.constexpr, SINK: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, KEPT_PAD: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Every `step`-th token's granule from `start` to `stop`, of a head whose fields `variant`
    describes.
    """
    for c in tl.static_range(len(VARIANTS)):
        if variant == VARIANTS[c]:
            for token in range(start, stop, step):
                _granule(
                    token, stop, head, p_head, window_ptr, archive_ptr, side_ptr,
                    p_window_table, p_archive_table, order_ptr, numbers_ptr,
                    stride_window_page, stride_archive_page, stride_side,
                    VARIANTS[c], SINK, H, D, BLOCK, WINDOW_BLOCK,
                )  # fmt: skip


# Not inlined for the compiler's sake, as `packed_columns._fold_head_alone`.
@triton.jit(noinline=True)
def _granule(
    token, stop, head, p_head, window_ptr, archive_ptr, side_ptr, p_window_table, p_archive_table,
    order_ptr, numbers_ptr, stride_window_page, stride_archive_page, stride_side,
    VARIANT: tl.constexpr, SINK: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, WINDOW_BLOCK: tl.constexpr,
):  # fmt: skip
    offset = tl.load(p_head + 2)
    side_offset = tl.load(p_head + 4)
    source = page_of(p_window_table, token // 32, WINDOW_BLOCK).to(tl.int64)
    page = tl.load(p_archive_table + token // BLOCK).to(tl.int64)
    slot = token % BLOCK
    o_32 = tl.arange(0, 32)
    row = head * WINDOW_BLOCK + row_of(token // 32, WINDOW_BLOCK)
    p_k = window_ptr + source * stride_window_page + (row + o_32) * (2 * D)
    p_page = archive_ptr + page * stride_archive_page + offset
    p_scale = side_ptr + page * stride_side + side_offset
    for c in tl.static_range(3):
        if row_bytes(VARIANT, c) > 0:
            _store_keys(
                p_k, p_page, slot, order_ptr + head * D,
                numbers_ptr + (4 * H + head) * D, numbers_ptr + (H + head) * D,
                c, VARIANT, BLOCK,
            )  # fmt: skip

    p_order = order_ptr + (H + head) * D
    p_mean = numbers_ptr + (5 * H + head) * D
    p_factor = numbers_ptr + (3 * H + head) * D
    squares = tl.zeros([32], tl.float32)
    for c in tl.static_range(3):
        if row_bytes(VARIANT, 3 + c) > 0:
            squares += _square_values(p_k + D, p_order, p_mean, p_factor, c, VARIANT)
    count = tl.full([32], max(stored_values(VARIANT), 1), tl.float32)
    scale = tl.sqrt_rn(tl.div_rn(squares, count))
    scale = tl.clamp(scale, LEAST, LARGEST).to(tl.float16)
    tl.store(p_scale + slot + o_32, scale)
    inverse = tl.div_rn(tl.full([32], 1.0, tl.float32), scale.to(tl.float32))
    for c in tl.static_range(3):
        if row_bytes(VARIANT, 3 + c) > 0:
            _store_values(
                p_k + D, p_page, slot, inverse, p_order, p_mean, p_factor, c, VARIANT, BLOCK
            )

    # Tiles are read whole: scales of slots that hold no token yet must not be NaN.
    nothing = tl.zeros([32], tl.float16)
    if token + 32 == stop:
        for i in range(slot + 32, BLOCK, 32):
            tl.store(p_scale + i + o_32, nothing)
    if token == SINK:
        for i in range(0, slot, 32):
            tl.store(p_scale + i + o_32, nothing)
