"""Times what the host does in a decode step's attention, eager, beside FlashAttention's.

    python benchmarks/host_time.py --mask mask.yaml bits.yaml --query-heads 32 --out host.json

For each mask, layer after layer is launched, all layers of the mask in turn as in a step, and the
host's time is taken until the last one is launched. Requests are so short that the device has done
a layer before the host has launched it; that it has is checked: the device's own time of the same
launches is in the results. Ours is `serving.step.attend_layer` (store, compact, attend),
FlashAttention's are the two calls of vLLM's backend.
"""

import argparse
import cProfile
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm_leank.kernels.channels import layer_channels

from vllm_leank.bench.cases import Case
from vllm_leank.bench.flash import BLOCK, FLASH, FlashDecode
from vllm_leank.bench.machine import require_gpu
from vllm_leank.bench.pools import Tables, layer_cache
from vllm_leank.bench.results import describe_mask, header, save_results
from vllm_leank.bench.timing import release
from vllm_leank.core.page_sizes import plan_cache
from vllm_leank.core.window import Window, whole_granules
from vllm_leank.errors import UserError
from vllm_leank.mask.file import load_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.settings import choose_format
from vllm_leank.serving.step import attend_layer

BATCHES = 1, 32
LENGTH = 96
"""Tokens of a request: few, but more than one page."""

STEPS = 200
DTYPE = torch.bfloat16


def tokens(batch: int, heads: int, head_dim: int) -> torch.Tensor:
    """Random queries, keys or values."""
    return torch.randn(batch, heads, head_dim, device="cuda").to(DTYPE)


def our_layers(
    mask: Mask, archive_format: Any, batch: int, query_heads: int
) -> list[Callable[[], object]]:
    """A call for each layer of the mask."""
    geometry = mask.geometry
    case = Case(batch, LENGTH, Window(whole_granules(mask.sink), mask.recent))
    plan = plan_cache(
        mask.profiles, geometry.head_dim, DTYPE.itemsize, archive_format=archive_format
    )
    tables = Tables.shuffled(case, plan.layer(0), 1, torch.device("cuda"))
    (step,) = tables.batches
    query = tokens(batch, query_heads, geometry.head_dim)
    key, value = (tokens(batch, geometry.num_kv_heads, geometry.head_dim) for _ in "kv")
    output = torch.empty_like(query)
    scale = geometry.head_dim**-0.5
    calls = []
    for layer in range(len(geometry.layers)):
        channels = layer_channels(*mask.layer(layer, range(geometry.num_kv_heads)))
        cache = layer_cache(plan.layer(layer), channels, case, tables, DTYPE)
        calls.append(partial(attend_layer, query, key, value, output, cache, step, scale))
    return calls


def flash_layers(mask: Mask, batch: int, query_heads: int) -> list[Callable[[], object]]:
    """The same for FlashAttention: new tokens into the pages, and attention, as vLLM calls them."""
    geometry = mask.geometry
    case = Case(batch, LENGTH, Window(whole_granules(mask.sink), mask.recent))
    query = tokens(batch, query_heads, geometry.head_dim)
    key, value = (tokens(batch, geometry.num_kv_heads, geometry.head_dim) for _ in "kv")
    one = torch.ones((), device="cuda")

    def layer() -> Callable[[], object]:
        flash = FlashDecode.random(case, query, geometry.num_kv_heads, 1, eight_bit=False)
        (attend,) = flash.calls(graph=False)
        last = flash.block_tables[0][:, (LENGTH - 1) // BLOCK].long()
        slots = last * BLOCK + (LENGTH - 1) % BLOCK

        def call() -> None:
            keys, values = flash.kv_pages.split(geometry.head_dim, dim=-1)
            ops.reshape_and_cache_flash(key, value, keys, values, slots, "auto", one, one)
            attend()

        return call

    return [layer() for _ in range(len(geometry.layers))]


def measure(calls: Sequence[Callable[[], object]]) -> dict[str, float]:
    """Microseconds of a layer: of the host, and of the device from a CUDA graph of a step."""

    def step() -> None:
        for call in calls:
            call()

    for _ in range(3):
        step()
    host = []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        host.append((time.perf_counter() - begin) / len(calls) * 1e6)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    graph.replay()
    events[0].record()
    for _ in range(STEPS):
        graph.replay()
    events[1].record()
    torch.cuda.synchronize()
    device = events[0].elapsed_time(events[1]) / STEPS / len(calls) * 1e3
    return {
        "host_us": statistics.median(host),
        "host_us_best": min(host),
        "device_us": device,
    }


def profile(calls: Sequence[Callable[[], object]]) -> None:
    """Print where the host's time goes."""
    profiler = cProfile.Profile()
    torch.cuda.synchronize()
    profiler.enable()
    for _ in range(STEPS):
        for call in calls:
            call()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mask", type=Path, nargs="+", required=True)
    parser.add_argument("--query-heads", type=int, required=True, help="of a layer")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--commit", help="of the code measured; asked of git when not given")
    args = parser.parse_args()
    require_gpu("host_time")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []

    def take(name: str, batch: int, calls: list[Callable[[], object]]) -> None:
        rows.append({"attention": name, "batch": batch, **measure(calls)})
        print(json.dumps(rows[-1]), flush=True)
        if args.profile:
            profile(calls)
        release()

    masks = [load_mask(path) for path in args.mask]
    for batch in BATCHES:
        take(FLASH, batch, flash_layers(masks[0], batch, args.query_heads))
        for mask in masks:
            one = choose_format(mask)
            take(one.name, batch, our_layers(mask, one, batch, args.query_heads))
    if args.out:
        program = "python benchmarks/host_time.py"
        result = header("host time of decode attention, eager, of one layer", args.commit, program)
        result |= {"masks": list(map(describe_mask, masks)), "query_heads": args.query_heads}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        save_results(result | {"rows": rows}, args.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"host_time: {error}")
