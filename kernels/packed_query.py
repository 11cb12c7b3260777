"""Queries in columns as products with codes take them: in the order of stored channels, divided by
the powers of two with which codes are read, and in the layout that threads hold them in.
"""

import triton
import triton.language as tl
from vllm_leank.kernels.codes import (
    first_channel,
    lanes,
    product_powers,
    row_bytes,
    swap_bytes,
)


@triton.jit
def all_alike(x, ALIKE: tl.constexpr):
    """Columns `[M, N]`, each `ALIKE` times side by side, `[M, N * ALIKE]`."""
    tl.static_assert(ALIKE <= 2)
    if ALIKE == 2:
        M: tl.constexpr = x.shape[0]
        N: tl.constexpr = x.shape[1]
        x = tl.reshape(tl.broadcast_to(x[:, :, None], (M, N, 2)), (M, 2 * N))
    return x


def query_places(variant: int, head_dim: int) -> list[int]:
    """Where the query's number for each stored channel of K is stored, of a head whose fields
    `variant` describes. So each thread finds the numbers that it multiplies side by side, four of
    each 16.
    """
    places = list(range(head_dim))
    for field in range(3):
        first, width = first_channel(variant, field), row_bytes(variant, field)
        for byte in range(width << field):
            if lanes(variant, field) == 1:
                place = swap_bytes.fn(byte)
            else:
                half = byte // 2 % (width // 2)
                thread = half % 8 // 2 * 2 + byte % 2
                place = byte // width * width + thread * (width // 8)
                place += half // 16 * 4 + half % 16 // 8 * 2 + half % 2
            places[first + byte] = first + place
    return places


@triton.jit
def write_query(
    p_scratch, p_q, m_q, p_order, p_places, p_mean, p_factor, p_half,
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Write the queries, in units of `unit`, fp16, to `[N, D]` at `p_scratch`, the number for each
    stored channel at its place of `Tables.order`. Returns `unit`, and what has to be added to each
    query's scores.
    """
    N: tl.constexpr = m_q.shape[0]
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    channel = tl.load(p_order + o_d, mask=m_d, other=0)
    place = tl.load(p_places + o_d, mask=m_d, other=0)
    q = tl.load(p_q[None, :] + channel[:, None], mask=m_d[:, None] & m_q[None, :], other=0.0)
    q = q.to(tl.float32)
    added = tl.sum(q * tl.load(p_mean + o_d, mask=m_d, other=0.0)[:, None], 0)
    q *= tl.load(p_factor + o_d, mask=m_d, other=0.0)[:, None]
    # The largest is 256, so that all fit into fp16, and with the codes' shifts keep their digits.
    unit = tl.maximum(tl.max(tl.abs(q), 0), 1e-30) / 256
    q = (q * (1 / unit)[None, :]).to(tl.float16)
    p_scratch += place[:, None] + tl.arange(0, N)[None, :] * D
    tl.store(p_scratch, q, mask=m_d[:, None] & m_q[None, :])
    half = tl.load(p_half + o_d, mask=m_d, other=0.0)
    return unit, added - tl.sum(q.to(tl.float32) * half[:, None], 0) * unit


@triton.jit
def _places_of_lane(o_w, EACH: tl.constexpr, LANE: tl.constexpr):
    """Where the numbers of one lane are stored, of each thread's `EACH`."""
    return o_w // EACH * (2 * EACH) + LANE * EACH + o_w % EACH


@triton.jit
def _turn_product(q):
    """Rows `[K, N]`, from the order of memory to that of halves of words."""
    K: tl.constexpr = q.shape[0]
    N: tl.constexpr = q.shape[1]
    q = tl.permute(tl.reshape(q, (4, K // 16, 2, 2, N)), (1, 2, 0, 3, 4))
    return tl.reshape(q, (K, N))


@triton.jit
def read_query(
    p_scratch, m_q, D: tl.constexpr, VARIANT: tl.constexpr, ALIKE: tl.constexpr
):  # fmt: skip
    """What the parts of bytes of each K field are multiplied by, or with two lanes every other byte
    of them: fp16 `[bytes / lanes, N * ALIKE]`, a tuple.
    """
    o_n = tl.arange(0, m_q.shape[0] * ALIKE) // ALIKE
    m_n = all_alike(m_q[None, :], ALIKE)
    parts = ()
    for c in tl.static_range(3):
        if row_bytes(VARIANT, c) > 0:
            for i in tl.static_range(1 << c):
                for lane in tl.static_range(lanes(VARIANT, c)):
                    o_w = tl.arange(0, row_bytes(VARIANT, c) // lanes(VARIANT, c))
                    if lanes(VARIANT, c) == 2:
                        o_w = _places_of_lane(o_w, row_bytes(VARIANT, c) // 8, lane)
                    o_w += first_channel(VARIANT, c) + i * row_bytes(VARIANT, c)
                    p_part = p_scratch + o_w[:, None] + o_n[None, :] * D
                    q = tl.load(p_part, mask=m_n, other=0.0)
                    # Codes are read as they lie in their bytes.
                    powers = product_powers(
                        row_bytes(VARIANT, c), 8 >> c, i, lane, lanes(VARIANT, c)
                    )
                    q *= (1 / powers)[:, None].to(tl.float16)
                    if lanes(VARIANT, c) == 2:
                        q = _turn_product(q)
                    parts = parts + (q,)  # noqa: RUF005
    return parts
