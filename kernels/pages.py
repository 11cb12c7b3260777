"""Device functions that load tiles of pages."""

import triton
import triton.language as tl


@triton.jit
def load_tile(
    desc, ptr, page, offset, row, column, stride_page, stride_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, USED_ROWS: tl.constexpr,
    USED_COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile `[ROWS, COLUMNS]` of a page part that begins `offset` elements into the page and has
    rows of `stride_row` elements. Beyond the used rows and columns it holds anything.

    With TMA, `desc` describes pages as `[page, row, column]` with this row length.
    """
    if TMA:
        tile = desc.load([page, offset // stride_row + row, column]).reshape(ROWS, COLUMNS)
    else:
        o_row = row + tl.arange(0, ROWS)
        o_column = column + tl.arange(0, COLUMNS)
        p_tile = ptr + page.to(tl.int64) * stride_page + offset
        p_tile += o_row[:, None] * stride_row + o_column[None, :]
        if (ROWS == USED_ROWS) & (COLUMNS == USED_COLUMNS):
            tile = tl.load(p_tile)
        else:
            m_row = tl.arange(0, ROWS) < USED_ROWS
            m_column = tl.arange(0, COLUMNS) < USED_COLUMNS
            tile = tl.load(p_tile, mask=m_row[:, None] & m_column[None, :], other=0.0)
    return tile


@triton.jit
def tile_place(p_table, i, exists, TILE: tl.constexpr, BLOCK: tl.constexpr, SELECTED: tl.constexpr):
    """The page of the `i`th tile that is read, and the tile's number. SELECTED: `p_table` has pages
    and numbers of those that are read, in turn; else it has the pages of all.
    """
    if SELECTED:
        page = tl.load(p_table + 2 * i, mask=exists, other=0)
        tile = tl.load(p_table + 2 * i + 1, mask=exists, other=0)
    else:
        page = tl.load(p_table + i * TILE // BLOCK, mask=exists, other=0)
        tile = i
    return page, tile


@triton.jit
def page_of(p_table, granule, WINDOW_BLOCK: tl.constexpr):
    """The window page in which a request's granule lies."""
    return tl.load(p_table + granule // (WINDOW_BLOCK // 32))


@triton.jit
def row_of(granule, WINDOW_BLOCK: tl.constexpr):
    """The first token of a granule within its window page."""
    return granule % (WINDOW_BLOCK // 32) * 32


@triton.jit
def window_tile(
    window_desc, window_ptr, page, head, row, stride_page,
    D: tl.constexpr, D_PAD: tl.constexpr, WINDOW_BLOCK: tl.constexpr, TILE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """K and V of `TILE` tokens of one head in a window page, from token `row` of it on, each
    `[TILE, D_PAD]`.
    """
    offset = head * (WINDOW_BLOCK * 2 * D)
    k = load_tile(window_desc, window_ptr, page, offset, row, 0, stride_page, 2 * D,
                  TILE, D_PAD, TILE, D, TMA)  # fmt: skip
    v = load_tile(window_desc, window_ptr, page, offset, row, D, stride_page, 2 * D,
                  TILE, D_PAD, TILE, D, TMA)  # fmt: skip
    return k, v


@triton.jit
def key_tile(
    desc, ptr, page, offset, slot, stride_page,
    KEPT: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """An archive tile of the K chunk of `WIDTH` of a head that keeps `KEPT` channels,
    `[TILE, WIDTH]`; the head's K begins at `offset`.
    """
    WIDER: tl.constexpr = KEPT // (2 * WIDTH) * (2 * WIDTH)
    return load_tile(desc, ptr, page, offset + BLOCK * WIDER, slot, 0, stride_page, WIDTH,
                     TILE, WIDTH, TILE, WIDTH, TMA)  # fmt: skip


@triton.jit
def chunk_channels(p_channels, KEPT: tl.constexpr, WIDTH: tl.constexpr):
    """The channels of the K chunk of `WIDTH`, `[WIDTH]`, of those that begin at `p_channels`."""
    WIDER: tl.constexpr = KEPT // (2 * WIDTH) * (2 * WIDTH)
    return tl.load(p_channels + WIDER + tl.arange(0, WIDTH))


@triton.jit
def value_tile(
    desc, ptr, page, offset, slot, stride_page,
    D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """An archive tile of a head's V, which begins at `offset`, `[D_PAD, TILE]`."""
    return load_tile(desc, ptr, page, offset, 0, slot, stride_page, BLOCK,
                     D_PAD, TILE, D, TILE, TMA)  # fmt: skip


@triton.jit
def scale_tile(
    desc, ptr, page, offset, slot, stride_page,
    TILE: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Scales of a tile's tokens, `[TILE]`, one number each, of a head whose scales begin `offset`
    numbers into the page.
    """
    if TMA:
        scales = desc.load([page, offset // BLOCK, slot]).reshape(TILE)
    else:
        scales = tl.load(ptr + page.to(tl.int64) * stride_page + offset + slot + tl.arange(0, TILE))
    return scales
