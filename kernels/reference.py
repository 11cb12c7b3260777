"""Store, compact and attend in plain PyTorch: the truth for other kernels, and the CPU path.

Attention is computed in fp32 whatever the pages' dtype. Only what the window rule allows is ever
read, so pages may hold anything elsewhere, NaN included.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.reference_parts import DensePart, PrunedPart, parts_of
from vllm_leank.kernels.reference_selection import hide_unselected
from vllm_leank.kernels.sinks import sinks_of_rows, softmax, with_sink_token

from vllm_leank.core.window import GRANULE

MAX_SCORES = 1 << 24
"""Scores of one KV head's query group that are held at once (64 MiB in fp32)."""


def store(key: torch.Tensor, value: torch.Tensor, cache: LayerCache, batch: Batch) -> None:
    """Write new keys and values, `[num_tokens, num_kv_heads, head_dim]`, to the window pages."""
    slots = batch.slots
    real = slots >= 0
    slots = slots[real].long()
    tokens = torch.cat((key[: real.numel()][real], value[: real.numel()][real]), dim=-1)
    block = cache.layout.window_block
    cache.window_pages[slots // block, :, slots % block] = tokens.to(cache.window_pages.dtype)


def compact(cache: LayerCache, batch: Batch) -> None:
    """Copy what left the dense window in this step to the archive, as its format stores it. V of
    slots without a token becomes finite in the pages that were written, so that whole pages can be
    multiplied by weights that are 0 there.
    """
    moved, empty = [], []
    block, window_block = cache.layout.archive_block, cache.layout.window_block
    for row in batch.rows:
        tokens = cache.window.compaction(row.before, row.after, row.exact_until)
        moved += [(row.table_row, token) for token in tokens]
        empty += [(row.table_row, slot) for slot in _empty_slots(tokens, cache.window.sink, block)]
    if not moved:
        return
    table_row, token = torch.tensor(moved, device=cache.window_pages.device).unbind(1)
    page = batch.window_table[table_row, token // window_block].long()
    # [granules of compaction, num_kv_heads, 32, 2 * head_dim]
    source = cache.window_pages.unflatten(2, (-1, GRANULE))[
        page, :, token % window_block // GRANULE
    ]
    pages, granules = _places(cache, batch, moved)
    empty_pages, empty_granules = _places(cache, batch, empty)

    for head, (channels, part) in enumerate(zip(cache.heads, cache.head_pages, strict=True)):
        if part is not None:
            key, value = source[:, head].split(cache.layout.head_dim, dim=-1)
            stored = cache.codec.encode(key, value, channels)
            part.write(pages, granules, stored)
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
    group = query.shape[1] // len(cache.heads)
    blocks = cache.layout.window_block, cache.layout.archive_block
    dense, pruned = batch.prepared(parts_of, cache.window, *blocks, MAX_SCORES // group)
    for part in dense:
        rows = slice(part.first, part.first + part.end - part.start)
        output[rows] = _attend_dense(query[rows], part, cache, batch, scale)
    for some in pruned:
        found = _attend_pruned(query[some.queries], some, cache, scale)
        output[some.queries] = found.to(output.dtype)


def _attend_dense(
    query: torch.Tensor, part: DensePart, cache: LayerCache, batch: Batch, scale: float
) -> torch.Tensor:
    """Exact causal attention of queries `[n, num_heads, head_dim]` of a request."""
    start, end = part.start, part.end
    pages = batch.window_table[part.table_row, : -(-end // cache.layout.window_block)].long()
    tokens = cache.window_pages[pages].transpose(0, 1).flatten(1, 2)[:, :end].float()
    key, value = tokens.split(cache.layout.head_dim, dim=-1)
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
    return attended[0, ..., : query.shape[-1]].transpose(0, 1).to(query.dtype)


def _attend_pruned(
    query: torch.Tensor, part: PrunedPart, cache: LayerCache, scale: float
) -> torch.Tensor:
    """Attention by the second rule of the queries of some requests, `[B, Q, num_heads, head_dim]`;
    fp32, in the same shape.
    """
    B, Q, num_heads, D = query.shape
    H = len(cache.heads)
    # [B, H, queries of the group, D], head by head
    queries = (query.float() * scale).transpose(1, 2).reshape(B, H, -1, D)
    sinks = sinks_of_rows(cache.sink_scores, H, Q)
    key, value = _dense_tokens(cache, part).split(D, dim=-1)
    dense_scores = _masked(queries @ key.mT, part.hidden_dense)
    dense = dense_scores.shape[-1]

    attended = torch.empty_like(queries)
    for head, (channels, pages) in enumerate(zip(cache.heads, cache.head_pages, strict=True)):
        scores, sink = dense_scores[:, head], None if sinks is None else sinks[head]
        if pages is None or part.archive_pages is None:
            attended[:, head] = softmax(scores, sink) @ value[:, head]
            continue
        stored = pages.read(part.archive_pages, part.granules)
        far_key, far_value = (
            one.unflatten(0, (B, -1)).flatten(1, 2) for one in cache.codec.decode(stored, channels)
        )
        far_scores = channels.k.products(queries[:, head], far_key)
        hidden = part.hidden_archived
        if cache.selection is not None:
            hidden = hide_unselected(queries[:, head], far_key, part, channels, cache)
        far_scores = _masked(far_scores, hidden)
        weights = softmax(torch.cat((scores, far_scores), dim=-1), sink)
        attended[:, head] = weights[..., :dense] @ value[:, head]
        attended[:, head] += channels.v.sums(weights[..., dense:], far_value)
    return attended.view(B, num_heads, Q, D).transpose(1, 2)


def _masked(scores: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """Scores `[B, ..., heads * Q, tokens]` without those of tokens that are hidden,
    `[B, ..., Q, tokens]`, from each head's queries.
    """
    if hidden is not None:
        scores.unflatten(-2, (-1, hidden.shape[-2])).masked_fill_(hidden.unsqueeze(-3), -torch.inf)
    return scores


def _dense_tokens(cache: LayerCache, part: PrunedPart) -> torch.Tensor:
    """K and V of the tokens that are read dense, fp32 `[B, num_kv_heads, tokens, 2 * head_dim]`."""
    head = torch.arange(len(cache.heads), device=cache.window_pages.device)[:, None]
    return cache.window_pages[part.window_pages[:, None], head, part.slots[:, None]].float()


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
