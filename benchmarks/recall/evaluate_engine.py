"""Exact match of the recall model through vLLM: dense attention against leank.

    python -m recall.evaluate_engine --out results.json
    python -m recall.evaluate_engine --base-url http://localhost:8000 http://localhost:8001

Without --base-url, the engines of --attention are started one after the other. With it, servers
that run are asked. The first is what the others are compared with. Prompts and answers are those of
`recall.evaluate`; here the engine writes the answers, greedily. Intervals are Wilson's, at 95%.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from recall.endpoint import Endpoint, EndpointError
from recall.evaluate import LENGTHS, head_commit, machine
from recall.tasks import TASKS, make_sample
from vllm_leank.offline.intervals import wilson

MODEL = str(Path(__file__).with_name("model"))
SLACK = 64  # tokens of the model's length beyond the longest sample

ENGINES: dict[str, dict[str, str] | None] = {
    "dense": None,
    "leank": {"prefill": "exact"},
    "leank-pruned": {"prefill": "pruned"},
}
"""leank's options by name; None is vLLM's own attention."""

Right = dict[tuple[str, int], list[bool]]
"""Per task and length, which samples were answered without a mistake."""


def main(argv: list[str] | None = None) -> int:
    """Measure every cell with every variant, print a table and write the results."""
    args = _parser().parse_args(argv)
    start = time.monotonic()
    seen: dict[str, Right] = {}
    variants = []
    try:
        for name in args.base_url or args.attention:
            with _variant(name, args) as (asked, facts):
                begin = time.monotonic()
                seen[name] = ask(asked, args.tasks, args.lengths, args.samples, name)
                seconds = round(time.monotonic() - begin, 1)
            first = next(iter(seen.values()))
            variants.append({"variant": name, **facts, "seconds": seconds})
            variants[-1] |= summarise(seen[name], None if len(seen) == 1 else first)
    except EndpointError as error:
        print(f"recall.evaluate_engine: {error}", file=sys.stderr)
        return 2
    print_table(variants, args.lengths)
    if args.out is not None:
        result = {
            "what": "greedy exact match of whole answers, held-out samples, through "
            + ("a server" if args.base_url else "the engine"),
            "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
            "commit": args.commit or head_commit(),
            "command": shlex.join(["python", "-m", "recall.evaluate_engine", *sys.argv[1:]]),
            "seconds": round(time.monotonic() - start, 1),
            "variants": variants,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recall.evaluate_engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--samples", type=int, default=256, help="per task and length")
    parser.add_argument("--commit", help="of the code measured; asked of git when not given")

    server = parser.add_argument_group("servers that run")
    server.add_argument("--base-url", nargs="+", metavar="URL", help="ask these")
    server.add_argument("--served-model-name", help="by default the first that a server lists")
    server.add_argument("--concurrency", type=int, default=16, help="requests at once")
    server.add_argument("--timeout", type=float, default=600, help="seconds for one answer")

    local = parser.add_argument_group("engines of this process")
    local.add_argument("--attention", nargs="+", choices=ENGINES, default=["dense", "leank"])
    local.add_argument("--mask", help="mask file; by default the one shipped for the model")
    local.add_argument("--dtype", default="auto")
    local.add_argument("--max-num-seqs", type=int, default=64)
    local.add_argument("--max-num-batched-tokens", type=int, default=16384)
    local.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    local.add_argument("--kv-cache-memory-bytes", type=int, help="where others use the GPU too")
    return parser


@contextmanager
def _variant(name: str, args: argparse.Namespace) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What answers, and what is to be noted of it."""
    if args.base_url:
        endpoint = Endpoint(
            name, MODEL, args.served_model_name, args.concurrency, timeout=args.timeout
        )
        yield endpoint, {"served_model_name": endpoint.model}
        return
    # Servers can be asked where vLLM is not installed.
    from vllm import __version__ as vllm_version

    from recall.engine import engine

    leank = ENGINES[name]
    if leank is not None and args.mask:
        leank = leank | {"mask": args.mask}
    with engine(
        MODEL,
        leank,
        dtype=args.dtype,
        max_model_len=max(args.lengths) + SLACK,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        gpu_memory_utilization=args.gpu_memory_utilization,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
    ) as running:
        facts = {"vllm": vllm_version, "dtype": running.dtype}
        yield running, facts | ({} if leank is None else {"mask": running.mask()})


def ask(asked: Any, tasks: list[str], lengths: list[int], samples: int, name: str) -> Right:
    """Ask the first held-out samples of every cell."""
    right: Right = {}
    for task in tasks:
        for length in lengths:
            batch = [make_sample(task, length, seed) for seed in range(samples)]
            right[task, length] = asked.right(batch)
            print(
                name, task, length, sum(right[task, length]), samples, file=sys.stderr, flush=True
            )
    return right


def summarise(right: Right, first: Right | None) -> dict[str, Any]:
    """Every cell, all cells together and, against `first`, answers that were lost and gained."""
    cells = [
        {"task": task, "length": length, **_share(answers)}
        for (task, length), answers in right.items()
    ]
    together = [one for answers in right.values() for one in answers]
    summary: dict[str, Any] = {"all": _share(together), "cells": cells}
    if first is not None:
        before = [one for answers in first.values() for one in answers]
        pairs = list(zip(before, together, strict=True))
        summary["lost"] = pairs.count((True, False))
        summary["gained"] = pairs.count((False, True))
    return summary


def _share(right: list[bool]) -> dict[str, Any]:
    low, high = wilson(sum(right), len(right))
    return {
        "n": len(right),
        "exact": sum(right),
        "accuracy": sum(right) / len(right),
        "interval": [round(low, 4), round(high, 4)],
    }


def print_table(variants: list[dict[str, Any]], lengths: list[int]) -> None:
    """Accuracy in % with its interval: tasks and variants by length."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("task", no_wrap=True)
    table.add_column("")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right", no_wrap=True)
    for task in dict.fromkeys(cell["task"] for cell in variants[0]["cells"]):
        for one in variants:
            cells = [_percent(cell) for cell in one["cells"] if cell["task"] == task]
            table.add_row(task, one["variant"], *cells)
        table.add_section()
    console = Console(highlight=False)
    console.print(table)
    for one in variants:
        against = ""
        if "lost" in one:
            against = (
                f"; of the answers right with {variants[0]['variant']}, {one['lost']} lost, "
                f"and {one['gained']} gained"
            )
        total = one["all"]
        console.print(
            f"{one['variant']}: {total['exact']} of {total['n']} right, {_percent(total)}{against}",
            soft_wrap=True,
        )


def _percent(cell: dict[str, Any]) -> str:
    low, high = cell["interval"]
    return f"{100 * cell['accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})"


if __name__ == "__main__":
    sys.exit(main())
