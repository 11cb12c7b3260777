"""Compiles, before the first request, every kernel that a plan's layers can need.

Which kernels these are follows from the layers' shapes, the window and the largest batch; lengths
and the numbers of requests beyond that choose none. A layer stands for all, since layers share
kernels (`CacheLayout.variants`).
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

import torch
from vllm_leank.kernels.batch import MAX_DECODE_QUERIES, Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.channels import first_channels
from vllm_leank.kernels.codecs import codec_of
from vllm_leank.kernels.decode import decode
from vllm_leank.kernels.decode_each import SELECTING_AT_ONCE, decode_requests
from vllm_leank.kernels.extend import extend
from vllm_leank.kernels.launch import decode_kinds
from vllm_leank.kernels.launcher import compiling
from vllm_leank.kernels.merge import merge
from vllm_leank.kernels.scratch import Scratch, needs_scratch
from vllm_leank.kernels.store import compact, store, update
from vllm_leank.kernels.unpack import unpack

from vllm_leank.core.pages import CacheLayout, pages
from vllm_leank.core.selection import Selection
from vllm_leank.core.window import Window


@dataclass(frozen=True)
class Attention:
    """The attention layers that kernels are compiled for.

    Attributes:
        layout: of any of the layers.
        window: the dense window.
        query_heads: of a layer, on this rank.
        dtype: of queries, K and V.
        max_reqs: most requests of a step.
        longest: most tokens of a request.
        sinks_dtype: of attention sinks; None: the layers have none.
        selection: of layers that have one; None: none has.
    """

    layout: CacheLayout
    window: Window
    query_heads: int
    dtype: torch.dtype
    max_reqs: int
    longest: int
    sinks_dtype: torch.dtype | None = None
    selection: Selection | None = None


@cache
def compile_kernels(
    attention: Attention, device: torch.device, tell: Callable[[str], None]
) -> None:
    """Compile them all, several at once; `tell` gets a line before and a line after. Done once for
    layers that need the same kernels.
    """
    begin = time.monotonic()
    tell("leank kernels: compiling; Triton keeps them on disk for the next start")
    workers = ThreadPoolExecutor(
        os.cpu_count(), initializer=torch.cuda.set_device, initargs=(torch.cuda.current_device(),)
    )
    with workers as executor, compiling(executor) as compilations:
        _dry_run(attention, _layer_cache(attention, device))
    seconds = time.monotonic() - begin
    tell(f"leank kernels: compiled {len(compilations)} kernels in {seconds:.1f} s")


def _dry_run(attention: Attention, cache: LayerCache) -> None:
    """Every kind of step."""
    layout, device = attention.layout, cache.window_pages.device

    def tokens(count: int, heads: int) -> torch.Tensor:
        return torch.empty((count, heads, layout.head_dim), dtype=attention.dtype, device=device)

    heads, query_heads = len(layout.profiles), attention.query_heads
    caches = [cache]
    batches = {*_counts(max(attention.max_reqs, 1)), *_kinds(cache, attention.max_reqs)}
    if attention.selection is not None:
        caches.append(replace(cache, selection=attention.selection))
        batches.update(_kinds(caches[1], attention.max_reqs))
    width = pages(attention.longest, layout.archive_block)
    for num_reqs in sorted(batches):
        query, batch = tokens(num_reqs, query_heads), _batch(num_reqs, 1, device, width)
        for one in caches:
            # As many at once as a step has: those that select take much memory.
            decode_requests(query, torch.empty_like(query), one, batch, scale=1.0)
        key = tokens(num_reqs, heads)
        update(key, key, cache, batch)
    prompt = _batch(1, 4 * MAX_DECODE_QUERIES, device, width)
    count = prompt.max_query_len
    key, query = tokens(count, heads), tokens(count, query_heads)
    store(key, key, cache, prompt)
    compact(cache, prompt)
    output = torch.empty_like(query)
    for one in caches[1:]:
        # Of an answer that is computed again, where it has any number of tokens.
        for part in _kinds(one, SELECTING_AT_ONCE):
            rows, batch = tokens(part, query_heads), _batch(part, 1, device, width)
            decode(rows, torch.empty_like(rows), one, batch, scale=1.0, after_prompt=True)
    extend(query, output, cache, prompt, scale=1.0)
    if cache.scratch is not None:
        unpack(cache, prompt, cache.scratch.regions(1, 1), 0)
        lse = torch.empty((query_heads, count), dtype=torch.float32, device=device)
        merge(output, lse, output, lse, cache)
        extend(query, output, cache, prompt, 1.0, lse)


def _counts(most: int) -> list[int]:
    """Numbers of queries that stand for all up to `most`: launches other than decode's are chosen
    by powers of two.
    """
    return sorted({min(1 << i, most) for i in range(most.bit_length() + 1)})


def _kinds(cache: LayerCache, most: int) -> list[int]:
    """Numbers of requests that stand for all up to `most` where decode is launched."""
    selects = cache.selection is not None
    return decode_kinds(most, cache.layout, cache.tables.device, selects)


def _layer_cache(attention: Attention, device: torch.device) -> LayerCache:
    """A layer with one page of each kind, as large as the real ones."""
    layout, codec = attention.layout, codec_of(attention.layout.archive_format)
    heads, head_dim = len(layout.profiles), layout.head_dim
    window_shape = (1, heads, layout.window_block, 2 * head_dim)
    sinks, dtype = attention.sinks_dtype, attention.dtype
    scratch = None
    if needs_scratch(layout, attention.window, attention.longest):
        scratch = Scratch.allocate(layout, attention.query_heads, 1, 0, dtype, device)
    archive = torch.empty((1, max(layout.archive_page_bytes, 512)), dtype=torch.uint8)
    return LayerCache(
        window_pages=torch.empty(window_shape, dtype=dtype, device=device),
        archive_pages=archive.to(device).view(codec.dtype(dtype)),
        layout=layout,
        heads=first_channels(layout).to(device).heads,
        window=attention.window,
        sink_scores=(
            None
            if sinks is None
            else torch.empty(attention.query_heads, dtype=sinks, device=device)
        ),
        scratch=scratch,
    )


def _batch(num_reqs: int, queries: int, device: torch.device, width: int) -> Batch:
    """A step in which each request has `queries` tokens, with tables of vLLM's dtypes; the
    archive's has `width` pages for each, as launches that select segments are chosen by it.
    """
    starts = torch.arange(0, num_reqs * queries + 1, queries, dtype=torch.int32)
    numbers = torch.zeros(num_reqs, dtype=torch.int32, device=device)
    table = torch.zeros((num_reqs, 16), dtype=torch.int32, device=device)
    return Batch(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=numbers,
        exact_until=numbers,
        window_table=table,
        archive_table=torch.zeros((num_reqs, width), dtype=torch.int32, device=device),
        slots=torch.zeros(num_reqs * queries, dtype=torch.int64, device=device),
        in_prompt=torch.zeros(num_reqs, dtype=torch.bool),
        max_query_len=queries,
        max_seq_len=queries,
    )
