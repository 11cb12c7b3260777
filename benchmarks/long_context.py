"""What decode steps of long requests read and what fits, on paper, and beside what was measured.

    python benchmarks/long_context.py --out long_context.json --measured 2=attention.json

The paper has `leank plan`'s own numbers for two shapes: a mask of so many bits alike in all heads,
the same window everywhere. The time is that of reading these bytes at a given rate, nothing else.

`--measured BITS=FILE` takes a file of `leank bench attention` or of `leank bench serve`, with masks
of so many bits in the mean, and puts what it has beside what the paper says of the same.

The results are printed as the tables of docs/performance.md.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from vllm_leank.bench.results import header, save_results
from vllm_leank.cli.sizes import parse_size
from vllm_leank.core.capacity import (
    BATCHED_TOKENS,
    STEPS_AT_ONCE,
    UTILIZATION,
    dense_capacity,
    estimate_pool,
    leank_capacity,
)
from vllm_leank.core.options import KEY, parse_options
from vllm_leank.core.reads import layer_reads, step_reads
from vllm_leank.core.selection import SHARE_UNITS, Selection
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.settings import Settings, plan_settings
from vllm_leank.offline.even_bits import even_mask

SHAPES = "llama-3.1-8b", "llama-3.1-70b"
RANKS = 1, 4, 8
LENGTHS = 1 << 17, 1 << 19, 1 << 20
BITS = 4, 2, 1
PAGES = 0.1
GPUS = "80GiB", "141GiB"
ITEMSIZE = 2
SINK, RECENT = 64, 256
RATE_TB_S = 4.55
"""What an H200 reads at most, as `leank bench attention` measures it (`read_limit_tb_s`)."""


@cache
def shape(name: str) -> Checkpoint:
    """The config of a shape."""
    return Checkpoint.open(str(Path(__file__).parent / "shapes" / name))


@cache
def settings(name: str, tp: int, bits: int, pages: float | None, prefill: str) -> Settings:
    """What a server of the shape with a mask of so many bits would go by."""
    mask = even_mask(name, shape(name).geometry, bits)
    given = {"sink": SINK, "recent": RECENT, "pages": pages, "prefill": prefill}
    return plan_settings(mask, parse_options({KEY: given}), ITEMSIZE, tp)


def row(
    name: str, tp: int, length: int, bits: int | None, pages: float | None, rate: float
) -> dict[str, Any]:
    """What a step of one request reads on a GPU, how long that takes, and how many requests fit.

    Args:
        name: of the shape.
        tp: tensor-parallel ranks.
        length: tokens of the request.
        bits: per number of far tokens; None: vLLM's dense cache.
        pages: share of far tokens that are read; None: all.
        rate: bytes per second that the GPU reads.
    """
    planned = settings(name, tp, bits or BITS[0], pages, "exact")
    if bits is None:
        reads = {"dense": planned.plan.dense_token_bytes * length}
    else:
        reads = asdict(step_reads(planned.plan, planned.window, length, planned.selection))
    total = sum(reads.values())
    weights = shape(name).weight_bytes(ITEMSIZE) // tp
    return {
        "shape": name,
        "tensor_parallel_size": tp,
        "length": length,
        "bits": bits,
        "pages": pages,
        "reads": reads,
        "bytes": total,
        "ms": total / rate * 1e3,
        "weight_bytes": weights,
        "weight_ms": weights / rate * 1e3,
        "requests": {gpu: _fitting(name, tp, length, bits, pages, gpu, weights) for gpu in GPUS},
    }


def _fitting(
    name: str, tp: int, length: int, bits: int | None, pages: float | None, gpu: str, weights: int
) -> dict[str, float] | None:
    """Requests that run at once on GPUs of a size, and that fit while prompts are computed, which
    are read exactly or pruned; None where the weights do not fit.
    """
    try:
        pool = estimate_pool(parse_size(gpu), UTILIZATION, weights)
    except UserError:
        return None
    in_flight = STEPS_AT_ONCE * BATCHED_TOKENS
    exact = settings(name, tp, bits or BITS[0], pages, "exact")
    if bits is None:
        held = dense_capacity(exact.plan, pool, length)
        return {"at_once": held.at_once, "in_prefill": held.in_prefill}
    held = leank_capacity(exact.plan, exact.window, pool, length, in_flight)
    found = {"at_once": held.at_once, "in_prefill": held.in_prefill}
    if pages is None:
        pruned = settings(name, tp, bits, None, "pruned")
        held = leank_capacity(pruned.plan, pruned.window, pool, length, in_flight)
        found |= {"at_once_pruned": held.at_once, "in_pruned_prefill": held.in_prefill}
    return found


def paper(rate: float) -> list[dict[str, Any]]:
    """All rows."""
    ways = [(None, None), *((bits, pages) for bits in BITS for pages in (None, PAGES))]
    return [
        row(name, tp, length, bits, pages, rate)
        for name in SHAPES
        for tp in RANKS
        for length in LENGTHS
        for bits, pages in ways
    ]


def measured(bits: int, results: dict[str, Any], rate: float) -> Iterator[dict[str, Any]]:
    """What a results file has of long requests, beside what the paper says of the same."""
    compare = _attention if "cases" in results else _engine
    for one in compare(bits, results):
        seconds = one["bytes"] / rate
        yield one | {
            "paper_ms": seconds * 1e3,
            "ratio": one["ms"] / seconds / 1e3,
            "gpu": results["machine"]["gpu"],
            "commit": results["commit"],
            "command": results["command"],
        }


def _attention(bits: int, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One layer: FlashAttention, and ours."""
    name, segments = results["mask"]["model"], results["shape"].get("segments")
    selection = None if segments is None else Selection(**segments)
    pages = None if selection is None else round(selection.share / SHARE_UNITS, 3)
    plan = settings(name, 1, bits, pages, "exact").plan
    for case in results["cases"]:
        batch, length = case["batch"], case["length"]
        if length < LENGTHS[0]:
            continue
        window = Window(case["sink"], case["recent"])
        layers = range(len(plan.profiles))
        read = [layer_reads(plan.layer(i), window, length, selection).total for i in layers]
        known = {"what": "a layer's attention", "batch": batch, "length": length}
        dense = plan.dense_token_bytes // len(layers) * batch * length
        yield known | {"bits": None, "pages": None, "bytes": dense, "ms": case["flash"]["ms"]}
        far = batch * sum(read) // len(layers)
        yield known | {"bits": bits, "pages": pages, "bytes": far, "ms": case["mean"]["ms"]}


def _engine(bits: int, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Whole steps of engines: the weights once, and the caches of all requests."""
    load = results["load"]
    name, length = Path(load["model"]).name, load["prompt_tokens"]
    for one in results["variants"]:
        arguments, batch = one["run"]["engine_args"], one["concurrent"]
        tp = arguments.get("tensor_parallel_size", 1)
        given = arguments.get("additional_config", {}).get(KEY)
        pages = None if given is None else given.get("pages")
        of_bits = None if given is None else bits
        planned = row(name, tp, length, of_bits, pages, 1.0)
        yield {
            "what": "a step of the engine",
            "batch": batch,
            "length": length,
            "bits": of_bits,
            "pages": pages,
            "bytes": planned["weight_bytes"] + batch * planned["bytes"],
            "ms": one["decode"]["tpot_p50_ms"],
        }


def line(*cells: object) -> str:
    """A row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def _groups(results: dict[str, Any]) -> Iterator[tuple[list[object], list[dict[str, Any]]]]:
    """The first cells of a table's row, and what it is about: a shape, ranks and a length that fit
    any GPU.
    """
    names = "shape", "tensor_parallel_size", "length"
    for (name, tp, length), rows in groupby(results["rows"], itemgetter(*names)):
        group = list(rows)
        if any(group[0]["requests"].values()):
            yield [name, tp, f"{length:,}"], group


def read_lines(results: dict[str, Any]) -> Iterator[str]:
    """Gigabytes of weights and of caches that a step reads on each GPU, and milliseconds."""
    for first, rows in _groups(results):
        weights = _reading(rows[0]["weight_bytes"], rows[0]["weight_ms"])
        yield line(*first, weights, *(_reading(one["bytes"], one["ms"]) for one in rows))


def _reading(read: int, milliseconds: float) -> str:
    return f"{read / 1e9:.3g} ({milliseconds:.3g})"


def fit_lines(results: dict[str, Any]) -> Iterator[str]:
    """Requests that fit, where all far tokens are read."""
    for first, rows in _groups(results):
        plain = [one for one in rows if one["pages"] is None]
        cells = [_requests(one["requests"][gpu]) for gpu in results["gpus"] for one in plain]
        yield line(*first, *cells)


def _requests(found: dict[str, float] | None) -> str:
    """How many are answered at once: with a star where their prompts have to be read pruned."""
    if found is None:
        return "no weights"
    if found["in_prefill"] >= 1:
        return f"{found['at_once']:.1f}"
    if found.get("in_pruned_prefill", 0) >= 1:
        return f"{found['at_once_pruned']:.1f}*"
    return "none"


def measured_lines(results: dict[str, Any]) -> Iterator[str]:
    """What was measured, beside the paper; of the same in several runs, the first."""
    rows = {
        (one["what"], one["batch"], one["length"], one["bits"] or 16, one["pages"] or 1): one
        for one in reversed(results["measured"])
    }
    for (what, batch, length, bits, pages), one in sorted(rows.items(), key=_in_order):
        name = "dense" if one["bits"] is None else f"{bits} bits"
        read = "all" if one["pages"] is None else f"{pages:.0%}"
        times = f"{one['paper_ms']:.3g}", f"{one['ms']:.3g}", f"{one['ratio']:.2f}x"
        yield line(what, f"{batch} x {length:,}", name, read, *times)


def _in_order(item: tuple[tuple[str, int, int, int, float], Any]) -> tuple[Any, ...]:
    what, batch, length, bits, pages = item[0]
    return what, batch, length, -bits, -pages


def main() -> None:
    """Compute, print the tables, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=RATE_TB_S, help="TB/s that a GPU reads")
    parser.add_argument("--measured", nargs="+", default=[], metavar="BITS=FILE")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--commit", help="of the code; asked of git when not given")
    args = parser.parse_args()
    rate = args.rate * 1e12
    results = header(
        "decode steps of long requests, on paper", args.commit, "python benchmarks/long_context.py"
    )
    results |= {"rate_tb_s": args.rate, "window": {"sink": SINK, "recent": RECENT}, "gpus": GPUS}
    results["rows"] = paper(rate)
    results["measured"] = []
    for text in args.measured:
        bits, _, path = text.partition("=")
        if not bits.isdecimal() or int(bits) not in BITS or not Path(path).is_file():
            raise UserError(f"--measured {text} is not BITS=FILE, with bits of {BITS} and a file")
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        results["measured"] += measured(int(bits), found, rate)
    for lines in (read_lines, fit_lines, measured_lines):
        print(*lines(results), sep="\n", end="\n\n")
    if args.out:
        save_results(results, args.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"long_context: {error}")
