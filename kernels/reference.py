"""Store, compact and attend in plain PyTorch: the truth for other kernels, and the CPU path.

Attention is computed in fp32 whatever the pages' dtype. Only what the window rule allows is ever
read, so pages may hold anything elsewhere, NaN included.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from vllm_leank.kernels.batch import Batch, Row

from vllm_leank.layout import WINDOW_BLOCK, CacheLayout
from vllm_leank.window import STEP, Window

MAX_SCORES = 1 << 24
"""Scores of one KV head's query group that are held at once (64 MiB in fp32)."""


@dataclass(frozen=True)
class LayerCache:
    """One layer's pages, its mask and the rule for reading them.

    Attributes:
        window_pages: `[num_blocks, num_kv_heads, 32, 2 * head_dim]`, K then V.
        archive_pages: `[num_blocks, page_items]`, described by `layout`.
        layout: where heads and chunks lie within an archive page.
        channels: per KV head, int64 `[kept]`: the kept K channels, ascending.
        window: the dense window.
    """

    window_pages: torch.Tensor
    archive_pages: torch.Tensor
    layout: CacheLayout
    channels: tuple[torch.Tensor, ...]
    window: Window


def store(key: torch.Tensor, value: torch.Tensor, cache: LayerCache, batch: Batch) -> None:
    """Write new keys and values, `[num_tokens, num_kv_heads, head_dim]`, to the window pages."""
    slots = batch.slots
    real = slots >= 0
    slots = slots[real].long()
    tokens = torch.cat((key[: real.numel()][real], value[: real.numel()][real]), dim=-1)
    cache.window_pages[slots // WINDOW_BLOCK, :, slots % WINDOW_BLOCK] = tokens.to(
        cache.window_pages.dtype
    )


def compact(cache: LayerCache, batch: Batch) -> None:
    """Copy what left the dense window in this step to the archive: kept K channels, and V of
    heads that keep any.
    """
    moved = [
        (row.table_row, token)
        for row in batch.rows
        for token in cache.window.compaction(row.before, row.after, row.exact_until)
    ]
    if not moved:
        return
    device = cache.window_pages.device
    table_row, token = torch.tensor(moved, device=device).unbind(1)
    source = cache.window_pages[batch.window_table[table_row, token // WINDOW_BLOCK].long()]
    block = cache.layout.archive_block
    pages = batch.archive_table[table_row, token // block].long()[:, None]
    slots = (token % block)[:, None] + torch.arange(STEP, device=device)

    head_dim = cache.layout.head_dim
    for head, part in enumerate(cache.layout.heads):
        if part.v_offset is None:
            continue
        kept = source[:, head, :, cache.channels[head]]
        for chunk in part.k_chunks:
            columns = kept[..., chunk.first : chunk.first + chunk.width]
            _rows(cache, chunk.offset, chunk.width)[pages, slots] = columns
        _rows(cache, part.v_offset, head_dim)[pages, slots] = source[:, head, :, head_dim:]


def attend(
    query: torch.Tensor, output: torch.Tensor, cache: LayerCache, batch: Batch, scale: float
) -> None:
    """Attention of every query, by the window rule, over pages that `store` and `compact` wrote.

    Args:
        query: `[num_tokens, num_heads, head_dim]`, after RoPE.
        output: like `query`; rows of requests in the batch are written.
        cache: the layer's pages.
        batch: the step's requests.
        scale: factor of the QK product.
    """
    for row in batch.rows:
        exact = min(max(row.exact_until - row.before, 0), row.after - row.before)
        first = row.queries.start
        if exact:
            part = slice(first, first + exact)
            output[part] = _attend(_attend_dense, query[part], row.before, row, cache, batch, scale)
        if first + exact < row.queries.stop:
            rest = slice(first + exact, row.queries.stop)
            output[rest] = _attend(
                _attend_pruned, query[rest], row.before + exact, row, cache, batch, scale
            )


def _attend(
    rule: Callable[..., torch.Tensor],
    query: torch.Tensor,
    start: int,
    row: Row,
    cache: LayerCache,
    batch: Batch,
    scale: float,
) -> torch.Tensor:
    """Apply one rule to queries `[n, num_heads, head_dim]` of a request, some at a time."""
    group = query.shape[1] // len(cache.channels)
    at_once = max(MAX_SCORES // (group * (start + len(query))), 1)
    parts = [
        rule(part, start + i * at_once, row, cache, batch, scale)
        for i, part in enumerate(query.split(at_once))
    ]
    return torch.cat(parts).to(query.dtype)


def _attend_dense(
    query: torch.Tensor, start: int, row: Row, cache: LayerCache, batch: Batch, scale: float
) -> torch.Tensor:
    """Exact causal attention of queries `[n, num_heads, head_dim]` at `start` onwards."""
    end = start + len(query)
    key, value = _dense_tokens(cache, batch.window_table[row.table_row], 0, end)
    mask = None
    if start:
        device = query.device
        mask = torch.arange(end, device=device) <= torch.arange(start, end, device=device)[:, None]
    attended = F.scaled_dot_product_attention(
        query.float().transpose(0, 1)[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=not start,
        scale=scale,
        enable_gqa=True,
    )
    return attended[0].transpose(0, 1)


def _attend_pruned(
    query: torch.Tensor, start: int, row: Row, cache: LayerCache, batch: Batch, scale: float
) -> torch.Tensor:
    """Attention by the second rule of queries `[n, num_heads, head_dim]` at `start` onwards."""
    device, window = query.device, cache.window
    end = start + len(query)
    position = torch.arange(start, end, device=device)[:, None]
    boundary = window.boundary(position + 1)
    # Tokens between the first and the last query's boundary are dense for some of the queries
    # and archived for others: they are read from both places, each under its own mask.
    oldest, newest = window.boundary(start + 1), window.boundary(end)

    table = batch.window_table[row.table_row]
    dense_ranges = (0, min(window.sink, end)), (min(oldest, end), end)
    parts = [_dense_tokens(cache, table, *tokens) for tokens in dense_ranges]
    key, value = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
    dense_at = torch.cat([torch.arange(*tokens, device=device) for tokens in dense_ranges])
    sees_dense = (dense_at <= position) & ((dense_at < window.sink) | (dense_at >= boundary))
    sees_archive = torch.arange(window.sink, newest, device=device) < boundary

    heads = query.float().transpose(0, 1).unflatten(0, (len(cache.channels), -1))
    attended = torch.empty_like(heads)
    for head, (channels, part) in enumerate(zip(cache.channels, cache.layout.heads, strict=True)):
        q = heads[head] * scale
        scores = (q @ key[head].T).masked_fill(~sees_dense, -torch.inf)
        if part.v_offset is None or newest == window.sink:
            attended[head] = scores.softmax(-1) @ value[head]
            continue
        tokens = torch.arange(window.sink, newest, device=device)
        archived_key, archived_value = _archived_tokens(
            cache, batch.archive_table[row.table_row], head, tokens
        )
        pruned = (q[..., channels] @ archived_key.T).masked_fill(~sees_archive, -torch.inf)
        weights = torch.cat((scores, pruned), dim=-1).softmax(-1)
        dense = scores.shape[-1]
        attended[head] = weights[..., :dense] @ value[head] + weights[..., dense:] @ archived_value
    return attended.flatten(0, 1).transpose(0, 1)


def _dense_tokens(
    cache: LayerCache, table: torch.Tensor, start: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of tokens `start` to `end`, fp32 `[num_kv_heads, end - start, head_dim]` each."""
    first = start // WINDOW_BLOCK
    pages = cache.window_pages[table[first : -(-end // WINDOW_BLOCK)].long()]
    tokens = pages.transpose(0, 1).flatten(1, 2)
    tokens = tokens[:, start - first * WINDOW_BLOCK : end - first * WINDOW_BLOCK].float()
    key, value = tokens.split(cache.layout.head_dim, dim=-1)
    return key, value


def _archived_tokens(
    cache: LayerCache, table: torch.Tensor, head: int, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept K channels `[len(tokens), kept]` and V `[len(tokens), head_dim]` of one head, fp32."""
    block = cache.layout.archive_block
    pages, slots = table[tokens // block].long(), tokens % block
    part = cache.layout.heads[head]
    assert part.v_offset is not None
    key = torch.cat([_rows(cache, c.offset, c.width)[pages, slots] for c in part.k_chunks], dim=-1)
    value = _rows(cache, part.v_offset, cache.layout.head_dim)[pages, slots]
    return key.float(), value.float()


def _rows(cache: LayerCache, offset: int, width: int) -> torch.Tensor:
    """View of one part of every archive page, `[num_blocks, archive_block, width]`."""
    block = cache.layout.archive_block
    part = cache.archive_pages[:, offset : offset + block * width]
    return part.unflatten(1, (block, width))
