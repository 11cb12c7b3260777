"""Times a chunk of a prompt that is read pruned, beside FlashAttention's exact chunk.

    python benchmarks/prompt_chunk.py --mask mask.yaml --query-heads 32 --out chunk.json
    python benchmarks/prompt_chunk.py --mask mask.yaml --query-heads 32 --layers 0,28 \
        --launch 64,64,4,3 128,64,4,2

Pages are random, in random order, and hold the whole prompt; the queries are its last ones. The
outputs of some are compared with the reference. What is timed is what serving does: codes are
unpacked for FlashAttention, unless `--extend-alone` is given. `--launch` tries other launches of
`extend` than the one that `kernels/launch.py` has for the layer: rows, tile, warps and stages.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm
from triton.testing import do_bench
from vllm_leank.kernels import extend, reference
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.channels import layer_channels
from vllm_leank.kernels.scratch import Scratch, needs_scratch

from vllm_leank.bench.cases import Case, parse_layers
from vllm_leank.bench.correctness import check_output
from vllm_leank.bench.machine import head_commit, machine, require_gpu
from vllm_leank.bench.pools import Tables, layer_cache
from vllm_leank.bench.results import describe_mask
from vllm_leank.core.page_sizes import plan_cache
from vllm_leank.core.pages import CacheLayout, pages
from vllm_leank.core.plan import CachePlan
from vllm_leank.core.window import Window, whole_granules
from vllm_leank.errors import UserError
from vllm_leank.mask.file import load_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.settings import choose_format
from vllm_leank.serving.flash import attend_exact, attend_pruned

CHECKED_QUERIES = 64
"""Queries at the end whose outputs are compared with the reference."""


def last_chunk(prompt: int, chunk: int, layout: CacheLayout) -> Tables:
    """Tables of one request that computes the last `chunk` tokens of its prompt."""
    widths = pages(prompt, layout.window_block), pages(prompt, layout.archive_block)
    window, archive = (1 + torch.randperm(n, device="cuda").int()[None] for n in widths)
    starts = torch.tensor([0, chunk], dtype=torch.int32)
    batch = Batch(
        query_start_loc=starts.cuda(),
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor([prompt], dtype=torch.int32, device="cuda"),
        exact_until=torch.zeros(1, dtype=torch.int32, device="cuda"),
        window_table=window,
        archive_table=archive,
        slots=torch.full((chunk,), -1, device="cuda"),
        in_prompt=torch.zeros(1, dtype=torch.bool),
        max_query_len=chunk,
        max_seq_len=prompt,
    )
    return Tables([batch], *(width + 1 for width in widths))


def launches(given: list[str]) -> dict[str, Callable[..., Any]]:
    """What chooses a launch, by the name that it has in the results."""
    chosen = extend.choose_extend
    if not given:
        return {"chosen": chosen}

    def fixed(text: str) -> Callable[..., Any]:
        names = ("rows", "tile", "warps", "stages")
        try:
            values = dict(zip(names, map(int, text.split(",")), strict=True))
        except ValueError:
            raise UserError(f"--launch {text} is not {','.join(names)}") from None
        return lambda *args: replace(chosen(*args), **values)

    return {text: fixed(text) for text in given}


def expected_output(
    query: torch.Tensor, cache: LayerCache, batch: Batch, scale: float
) -> torch.Tensor:
    """The reference's output for the last queries, fp32."""
    last = query[-CHECKED_QUERIES:].float()
    starts = torch.tensor([0, len(last)], dtype=torch.int32)
    some = replace(batch, query_start_loc=starts.cuda(), query_start_loc_cpu=starts)
    output = torch.empty_like(last)
    reference.attend(last, output, cache, some, scale)
    return output


def measure(args: argparse.Namespace, mask: Mask, progress: tqdm) -> dict[str, Any]:
    """Milliseconds of FlashAttention, and of ours by layer, archive and launch.

    Raises:
        CorrectnessError: an output is wrong.
    """
    geometry = mask.geometry
    scale = geometry.head_dim**-0.5
    window = Window(whole_granules(mask.sink), mask.recent, exact=False)
    case = Case(1, args.prompt, window)
    query = torch.randn(args.chunk, args.query_heads, geometry.head_dim, device="cuda")
    query = (2 * query).bfloat16()
    output = torch.empty_like(query)

    def cache_of(plan: CachePlan, layer: int) -> tuple[LayerCache, Batch]:
        layout = plan.layer(layer)
        tables = last_chunk(args.prompt, args.chunk, layout)
        channels = layer_channels(*mask.layer(layer, range(geometry.num_kv_heads)))
        cache = layer_cache(layout, channels, case, tables, query.dtype)
        if not args.extend_alone and needs_scratch(layout, window, args.prompt):
            far = window.boundary(args.prompt) - window.sink
            room = args.query_heads, far, args.chunk, query.dtype, query.device
            cache = replace(cache, scratch=Scratch.allocate(layout, *room))
        return cache, tables.batches[0]

    cells: list[dict[str, Any]] = []
    result: dict[str, Any] = {"cells": cells}
    plan = plan_cache(mask.profiles, geometry.head_dim, 2, archive_format=choose_format(mask))
    for layer in args.layers:
        cache, batch = cache_of(plan, layer)
        if "flash_ms" not in result:
            exact = partial(attend_exact, query, output, cache, batch, scale)
            result["flash_ms"] = do_bench(exact, return_mode="median")
        expected = expected_output(query, cache, batch, scale)
        for name, choose in launches(args.launch).items():
            output.fill_(float("nan"))
            # A cache that has prepared nothing yet.
            ours = partial(attend_pruned, query, output, replace(cache), batch, scale)
            with mock.patch.object(extend, "choose_extend", choose):
                ms = do_bench(ours, return_mode="median")
            cells.append(
                {
                    "archive_format": plan.archive_format.name,
                    "launch": name,
                    "layer": layer,
                    "kept": list(cache.layout.kept),
                    "unpacked": cache.scratch is not None,
                    "ms": ms,
                    "error": check_output(
                        f"leank, layer {layer}", case, output[-CHECKED_QUERIES:], expected
                    ),
                }
            )
            progress.update()
    return result | {"means": means_of(cells, result["flash_ms"])}


def means_of(cells: list[dict[str, Any]], flash_ms: float) -> list[dict[str, Any]]:
    """Means over layers, by archive and launch."""
    groups: dict[tuple[str, str], list[float]] = {}
    for cell in cells:
        groups.setdefault((cell["archive_format"], cell["launch"]), []).append(cell["ms"])
    return [
        {
            "archive_format": archive_format,
            "launch": launch,
            "ms": statistics.mean(times),
            "speedup_flash": flash_ms / statistics.mean(times),
        }
        for (archive_format, launch), times in groups.items()
    ]


def main() -> None:
    """Measure, print the means, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mask", type=Path, required=True, help="whose layers are measured")
    parser.add_argument("--query-heads", type=int, required=True, help="of a layer")
    parser.add_argument("--prompt", type=int, default=32768, help="tokens of the prompt")
    parser.add_argument("--chunk", type=int, default=8192, help="of them computed last, at once")
    parser.add_argument("--layers", help="layers to measure, such as 0,28; default: all")
    parser.add_argument("--extend-alone", action="store_true", help="unpack nothing for others")
    parser.add_argument("--launch", nargs="+", default=[], metavar="ROWS,TILE,WARPS,STAGES")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--commit", help="of the code measured; asked of git when not given")
    args = parser.parse_args()
    mask = load_mask(args.mask)
    args.layers = parse_layers(args.layers, len(mask.geometry.layers))
    total = len(args.layers) * len(launches(args.launch))
    if not 0 < args.chunk <= args.prompt:
        raise UserError(f"--chunk {args.chunk} is no part of a prompt of {args.prompt} tokens")
    require_gpu("prompt_chunk")
    torch.manual_seed(0)
    with tqdm(total=total, desc="layers", unit="") as progress:
        measured = measure(args, mask, progress)
    print(json.dumps({"flash_ms": measured["flash_ms"], "means": measured["means"]}, indent=1))
    if args.out:
        result = {
            "what": "a chunk of a prompt that is read pruned, one layer",
            "command": shlex.join(["python", "benchmarks/prompt_chunk.py", *sys.argv[1:]]),
            "commit": args.commit or head_commit(),
            "machine": machine(),
            "mask": describe_mask(mask),
            "prompt": args.prompt,
            "chunk": args.chunk,
            "query_heads": args.query_heads,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result | measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"prompt_chunk: {error}")
