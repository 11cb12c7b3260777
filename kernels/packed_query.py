"""Queries as products with codes take them: in the order of stored channels, divided by the powers
of two with which codes are read, and in the layout that threads hold them in. They change their
order by way of memory, to which they are written in the same way for all profiles.
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
def _of_queries(x, ROWS: tl.constexpr):
    return x[:, None] if ROWS else x[None, :]


@triton.jit
def _of_channels(x, ROWS: tl.constexpr):
    return x[None, :] if ROWS else x[:, None]


@triton.jit
def write_query(
    p_written, o_written, p_q, m_q, p_order, p_places, p_mean, p_factor, p_half,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the queries at `p_q` `[N]`, in units of `unit`, fp16, `o_written` `[N]` numbers from
    `p_written` on, the number for each stored channel at its place of `Tables.order`. Returns
    `unit`, and what has to be added to each query's scores, `[N]`. ROWS: queries are in rows as
    threads hold them, else in columns.
    """
    CHANNELS: tl.constexpr = 1 if ROWS else 0  # their axis
    o_d = tl.arange(0, D_PAD)
    m_d = o_d < D
    channel = tl.load(p_order + o_d, mask=m_d, other=0)
    place = tl.load(p_places + o_d, mask=m_d, other=0)
    m_qd = _of_queries(m_q, ROWS) & _of_channels(m_d, ROWS)
    p_channels = _of_queries(p_q, ROWS) + _of_channels(channel, ROWS)
    q = tl.load(p_channels, mask=m_qd, other=0.0).to(tl.float32)
    mean = tl.load(p_mean + o_d, mask=m_d, other=0.0)
    added = tl.sum(q * _of_channels(mean, ROWS), CHANNELS)
    q *= _of_channels(tl.load(p_factor + o_d, mask=m_d, other=0.0), ROWS)
    # The largest is 256, so that all fit into fp16, and with the codes' shifts keep their digits.
    unit = tl.maximum(tl.max(tl.abs(q), CHANNELS), 1e-30) / 256
    q = (q * _of_queries(1 / unit, ROWS)).to(tl.float16)
    o_places = _of_queries(o_written, ROWS) + _of_channels(place, ROWS)
    tl.store(p_written + o_places, q, mask=m_qd)
    half = tl.load(p_half + o_d, mask=m_d, other=0.0)
    return unit, added - tl.sum(q.to(tl.float32) * _of_channels(half, ROWS), CHANNELS) * unit


@triton.jit
def _places(VARIANT: tl.constexpr, FIELD: tl.constexpr, PART: tl.constexpr, LANE: tl.constexpr):
    """Where the numbers of a lane's products are of a query, `[bytes / lanes]`: with two lanes
    those that a thread multiplies side by side.
    """
    W: tl.constexpr = row_bytes(VARIANT, FIELD)
    o_w = tl.arange(0, W // lanes(VARIANT, FIELD))
    if lanes(VARIANT, FIELD) == 2:
        EACH: tl.constexpr = W // 8
        o_w = o_w // EACH * (2 * EACH) + LANE * EACH + o_w % EACH
    return o_w + first_channel(VARIANT, FIELD) + PART * W


@triton.jit
def _turn_product(q):
    """Rows `[K, N]`, from the order of memory to that of halves of words."""
    K: tl.constexpr = q.shape[0]
    N: tl.constexpr = q.shape[1]
    q = tl.permute(tl.reshape(q, (4, K // 16, 2, 2, N)), (1, 2, 0, 3, 4))
    return tl.reshape(q, (K, N))


@triton.jit
def _inverse_powers(
    VARIANT: tl.constexpr, FIELD: tl.constexpr, PART: tl.constexpr, LANE: tl.constexpr
):  # fmt: skip
    """Of what codes are multiplied by as they lie in their bytes, fp16 `[bytes / lanes]`."""
    W: tl.constexpr = row_bytes(VARIANT, FIELD)
    powers = product_powers(W, 8 >> FIELD, PART, LANE, lanes(VARIANT, FIELD))
    return (1 / powers).to(tl.float16)


@triton.jit
def read_columns(
    p_written, m_q, D: tl.constexpr, VARIANT: tl.constexpr, ALIKE: tl.constexpr
):  # fmt: skip
    """What the parts of bytes of each K field are multiplied by, or with two lanes every other byte
    of them: fp16 `[bytes / lanes, N * ALIKE]`, a tuple, of queries that are `D` numbers apart.
    """
    o_n = tl.arange(0, m_q.shape[0] * ALIKE) // ALIKE
    m_n = all_alike(m_q[None, :], ALIKE)
    parts = ()
    for c in tl.static_range(3):
        if row_bytes(VARIANT, c) > 0:
            for i in tl.static_range(1 << c):
                for lane in tl.static_range(lanes(VARIANT, c)):
                    p_part = p_written + _places(VARIANT, c, i, lane)[:, None] + o_n[None, :] * D
                    q = tl.load(p_part, mask=m_n, other=0.0)
                    q *= _inverse_powers(VARIANT, c, i, lane)[:, None]
                    if lanes(VARIANT, c) == 2:
                        q = _turn_product(q)
                    parts = parts + (q,)  # noqa: RUF005
    return parts


@triton.jit
def read_rows(p_written, o_written, m_q, VARIANT: tl.constexpr):
    """The same with queries in rows, `[M, bytes / lanes]`, from where they were written."""
    o_m, m_m = o_written[:, None], m_q[:, None]
    parts = ()
    for c in tl.static_range(3):
        if row_bytes(VARIANT, c) > 0:
            for i in tl.static_range(1 << c):
                for lane in tl.static_range(lanes(VARIANT, c)):
                    place = _places(VARIANT, c, i, lane)
                    if lanes(VARIANT, c) == 2:
                        place = tl.reshape(_turn_product(place[:, None]), place.shape)
                    q = tl.load(p_written + (o_m + place[None, :]), mask=m_m, other=0.0)
                    q *= _inverse_powers(VARIANT, c, i, lane)[None, :]
                    parts = parts + (q,)  # noqa: RUF005
    return parts
