"""Store, compact and attend in plain PyTorch: the truth for other kernels, and the CPU path.

Attention is computed in fp32 whatever the pages' dtype. Only what the window rule allows is ever
read, so pages may hold anything elsewhere, NaN included.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from vllm_leank.kernels.batch import Batch, Row
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.codecs.codec import Stored
from vllm_leank.kernels.sinks import softmax, with_sink_token

from vllm_leank.core.pages import WINDOW_BLOCK
from vllm_leank.core.window import GRANULE, Window

MAX_SCORES = 1 << 24
"""Scores of one KV head's query group that are held at once (64 MiB in fp32)."""


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
    """Copy what left the dense window in this step to the archive, as its format stores it. V of
    slots without a token becomes finite in the pages that were written, so that whole pages can be
    multiplied by weights that are 0 there.
    """
    moved, empty = [], []
    block = cache.layout.archive_block
    for row in batch.rows:
        tokens = cache.window.compaction(row.before, row.after, row.exact_until)
        moved += [(row.table_row, token) for token in tokens]
        empty += [(row.table_row, slot) for slot in _empty_slots(tokens, cache.window.sink, block)]
    if not moved:
        return
    table_row, token = torch.tensor(moved, device=cache.window_pages.device).unbind(1)
    source = cache.window_pages[batch.window_table[table_row, token // WINDOW_BLOCK].long()]
    pages, granules = _places(cache, batch, moved)
    empty_pages, empty_granules = _places(cache, batch, empty)

    for head, (channels, part) in enumerate(zip(cache.heads, cache.head_pages, strict=True)):
        if part is not None:
            key, value = source[:, head].split(cache.layout.head_dim, dim=-1)
            part.write(pages, granules, cache.codec.encode(key, value, channels))
            part.clear(empty_pages, empty_granules, cache.codec)


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
    group = query.shape[1] // len(cache.heads)
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
    queries, mask, sink_scores = query.float().transpose(0, 1), None, cache.sink_scores
    if start or sink_scores is not None:
        device = query.device
        mask = torch.arange(end, device=device) <= torch.arange(start, end, device=device)[:, None]
        if sink_scores is not None:
            queries, key, value = with_sink_token(queries, key, value, sink_scores, scale)
            mask = F.pad(mask, (1, 0), value=True)
    attended = F.scaled_dot_product_attention(
        queries[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return attended[0, ..., : query.shape[-1]].transpose(0, 1)


def _attend_pruned(
    query: torch.Tensor, start: int, row: Row, cache: LayerCache, batch: Batch, scale: float
) -> torch.Tensor:
    """Attention by the second rule of queries `[n, num_heads, head_dim]` at `start` onwards."""
    window, end = cache.window, start + len(query)
    newest = window.boundary(end)
    table = batch.window_table[row.table_row]
    parts = [_dense_tokens(cache, table, *tokens) for tokens in _dense_ranges(window, start, end)]
    key, value = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
    hidden, hidden_archived = batch.prepared(_hidden, window, start, end)

    heads = query.float().transpose(0, 1).unflatten(0, (len(cache.heads), -1))
    sinks = None if cache.sink_scores is None else cache.sink_scores.view(*heads.shape[:2], 1, 1)
    attended = torch.empty_like(heads)
    for head, part in enumerate(cache.head_pages):
        q, sink = heads[head] * scale, None if sinks is None else sinks[head]
        scores = _masked(q @ key[head].T, hidden)
        if part is None or newest == window.sink:
            attended[head] = softmax(scores, sink) @ value[head]
            continue
        archived_key, archived_value = _archived_tokens(
            cache, batch.archive_table[row.table_row], head, newest
        )
        pruned = _masked(q @ archived_key.T, hidden_archived)
        weights = softmax(torch.cat((scores, pruned), dim=-1), sink)
        dense = scores.shape[-1]
        attended[head] = weights[..., :dense] @ value[head] + weights[..., dense:] @ archived_value
    return attended.flatten(0, 1).transpose(0, 1)


def _dense_ranges(window: Window, start: int, end: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Tokens that queries from `start` to `end` read from window pages.

    Those between the first and the last query's boundary are dense for some of the queries and
    archived for others: they are read from both places, each under its own mask.
    """
    return (0, min(window.sink, end)), (min(window.boundary(start + 1), end), end)


def _hidden(
    batch: Batch, window: Window, start: int, end: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Which dense and which archived tokens that are read the queries from `start` to `end` do not
    see, bool `[end - start, tokens]`; a single query sees them all: None.
    """
    if end - start == 1:
        return None, None
    device = batch.window_table.device
    position = torch.arange(start, end, device=device)[:, None]
    boundary = window.boundary(position + 1)
    ranges = _dense_ranges(window, start, end)
    dense_at = torch.cat([torch.arange(*tokens, device=device) for tokens in ranges])
    sees_dense = (dense_at <= position) & ((dense_at < window.sink) | (dense_at >= boundary))
    archived_at = torch.arange(window.sink, window.boundary(end), device=device)
    return ~sees_dense, archived_at >= boundary


def _masked(scores: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


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
    cache: LayerCache, table: torch.Tensor, head: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one head, which stores anything, as the archive gives them back: fp32
    `[end - sink, head_dim]` each, of the tokens from the sink to `end`.
    """
    block, part = cache.layout.archive_block, cache.head_pages[head]
    assert part is not None
    first = cache.window.sink // block
    stored = part.read(table[first : -(-end // block)].long())
    begin = cache.window.sink - first * block
    granules = slice(begin // GRANULE, (end - first * block) // GRANULE)
    within = Stored(*(field[granules] for field in stored))
    key, value = cache.codec.decode(within, cache.heads[head])
    return key.flatten(0, 1), value.flatten(0, 1)


def _empty_slots(tokens: range, sink: int, block: int) -> Iterator[int]:
    """Beginnings of the runs of 32 slots that hold no token, in the archive pages that compaction
    of `tokens` begins or ends.
    """
    if tokens and tokens.start == sink:
        yield from range(sink // block * block, sink, GRANULE)
    if tokens:
        yield from range(tokens.stop, -(-tokens.stop // block) * block, GRANULE)


def _places(
    cache: LayerCache, batch: Batch, slots: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where runs of 32 archive slots lie that begin at `(table row, slot)`: pages, and the runs'
    indices within them.
    """
    device, block = cache.window_pages.device, cache.layout.archive_block
    row, slot = torch.tensor(slots, dtype=torch.long, device=device).view(-1, 2).unbind(1)
    return batch.archive_table[row, slot // block].long(), slot % block // GRANULE
