"""Prompts that arrive while other requests are answered: engines of one model under equal load.

    python benchmarks/mixed_load.py --model MODEL --variants dense,mask.yaml \
        --rates 0.5,1 --seconds 90 --minutes 15 --out mixed_load.json

Each variant (`dense`, a mask's file, or a `kv_cache_dtype`) is served by `vllm serve`, one after
the other. The load generator of `vllm bench serve` sends random prompts in Poisson arrivals, at one
rate after the other, and measures. All engines get the same prompts at the same times. No prompt is
sent twice, so nothing is found in a prefix cache. Before that, a few are sent and not measured.

The results are written anew after every cell. The minutes left are shared out evenly among the
engines to come, and an engine's among its rates. Requests of a cell that are not done by then are
given up: its figures are those of the others, and `failed` counts them. Exits with 1 if a cell is
missing, or requests of it failed or were given up.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from engine_server import CONSOLE, engine_server, flags, leave_in_order
from real.served import DENSE, Served, check_words, served
from server_metrics import ASKED, FOUND, PREEMPTIONS, RUNNING, metric
from stand_in_tokenizer import tokenizer_for

from vllm_leank.bench.results import describe_mask, header, save_results
from vllm_leank.bench.serve import parse_engine_args
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import load_mask

KIND = "mixed load"
"""What results files say they are."""

LOAD = "prompt_tokens", "output_tokens", "rates", "seconds", "goodput", "warm_up", "seed"
"""Options that describe the load."""

ROOM = 64
"""Tokens of a request beyond its longest prompt and answer: decoded prompts may get longer."""

WARM_UP_SEED = 1000
"""Added to the seed for prompts that are not measured."""

BACKEND = "openai"
"""What the load generator calls a server of this kind."""

GRACE = 90
"""Seconds after its minutes at which the program ends, whatever it waits for."""

LATENCIES = "ttft", "tpot", "itl"
"""Time to the first token; per token after it, a mean of each request; between any two tokens."""

FIGURES = {
    "seconds": "duration",
    "completed": "completed",
    "failed": "failed",
    "prompt_tokens": "total_input_tokens",
    "output_tokens": "total_output_tokens",
    "requests_per_s": "request_throughput",
    "good_requests_per_s": "request_goodput",
    "output_tokens_per_s": "output_throughput",
    "total_tokens_per_s": "total_token_throughput",
    "most_at_once": "max_concurrent_requests",
}
"""Our names of the load generator's figures."""


@contextlib.contextmanager
def given_up_after(limit: float) -> Iterator[None]:
    """Within it, the load generator gives up what is not done `limit` seconds after its start."""
    from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS, RequestFuncOutput

    ask, until = ASYNC_REQUEST_FUNCS[BACKEND], time.monotonic() + limit

    async def ask_until(*words: Any, **named: Any) -> RequestFuncOutput:
        begin, left = time.perf_counter(), max(until - time.monotonic(), 0)
        try:
            return await asyncio.wait_for(ask(*words, **named), left)
        except TimeoutError:
            return RequestFuncOutput(start_time=begin, error=f"not done after {left:.0f} s")

    ASYNC_REQUEST_FUNCS[BACKEND] = ask_until
    try:
        yield
    finally:
        ASYNC_REQUEST_FUNCS[BACKEND] = ask


def load(url: str, args: argparse.Namespace, limit: float, **options: Any) -> dict[str, Any]:
    """Send one load to the server at `url` by the generator of `vllm bench serve`; its result.
    Requests that are not done after `limit` seconds count as failed.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    spread = {
        name: (most - least) / (most + least)
        for name, (least, most) in (("input", args.prompt_tokens), ("output", args.output_tokens))
    }
    options = {
        "backend": BACKEND,
        "base_url": url,
        "model": args.model,
        "tokenizer": args.tokenizer,
        "dataset_name": "random",
        "random_input_len": sum(args.prompt_tokens) // 2,
        "random_output_len": sum(args.output_tokens) // 2,
        "random_range_ratio": spread,
        "ignore_eos": True,
        "percentile_metrics": ",".join(LATENCIES),
        "metric_percentiles": "50,99",
        **options,
    }
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    parsed = parser.parse_args([*flags(options), "--goodput", *args.goodput])
    # In this process: starting vLLM's command takes as long as some cells.
    with contextlib.redirect_stdout(sys.stderr), given_up_after(limit):
        return asyncio.run(main_async(parsed))


def counters(url: str) -> dict[str, float]:
    """The server's counts of preemptions and of prompt tokens."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    names = {"preemptions": PREEMPTIONS, "asked": ASKED, "found": FOUND, "running": RUNNING}
    return {key: metric(text, name) or 0.0 for key, name in names.items()}


def cell(url: str, args: argparse.Namespace, index: int, limit: float) -> dict[str, Any]:
    """Measure one rate, the `index`-th; what came of it."""
    rate = args.rates[index]
    prompts = max(1, round(rate * args.seconds))
    found: dict[str, Any] = {"rate": rate, "prompts": prompts}
    before = counters(url)
    result = load(url, args, limit, num_prompts=prompts, request_rate=rate, seed=args.seed + index)
    after = counters(url)
    wait_for_quiet(url, 30)
    if not result["completed"]:
        return found | {"error": f"no request was done after {limit:.0f} s"}
    found |= {ours: result[theirs] for ours, theirs in FIGURES.items()}
    for name in LATENCIES:
        found[f"{name}_ms"] = {
            "p50": result[f"p50_{name}_ms"],
            "p99": result[f"p99_{name}_ms"],
            "mean": result[f"mean_{name}_ms"],
        }
    found["preemptions"] = after["preemptions"] - before["preemptions"]
    found["prompt_tokens_found"] = after["found"] - before["found"]
    return found


def is_whole(found: dict[str, Any]) -> bool:
    """Whether all requests of a cell were answered. If not, its figures are those of the others,
    which waited least.
    """
    return "error" not in found and not found["failed"]


def wait_for_quiet(url: str, seconds: float) -> None:
    """Wait until the server has ended the requests whose clients have left."""
    until = time.monotonic() + seconds
    while counters(url)["running"] and time.monotonic() < until:
        time.sleep(0.5)


def run_engine(
    one: Served,
    args: argparse.Namespace,
    until: float,
    done: Callable[[dict[str, Any]], None],
) -> None:
    """Start an engine, send it all loads until the clock shows `until`, and give each cell away.

    Raises:
        UserError: it does not start.
    """
    server = engine_server(
        args.model,
        {"tokenizer": args.tokenizer} | one.engine_args | args.engine_args,
        log=args.out.with_suffix(f".{one.name}.log"),
        seconds=until - time.monotonic(),
    )
    with server as (url, start):
        limit = (until - time.monotonic()) / (len(args.rates) + 1)
        load(url, args, limit, num_prompts=args.warm_up, seed=args.seed + WARM_UP_SEED)
        for index in range(len(args.rates)):
            limit = (until - time.monotonic()) / (len(args.rates) - index)
            row = {"variant": one.name, "start_s": start} | cell(url, args, index, limit)
            CONSOLE.print(summary(row))
            done(row)


def summary(row: dict[str, Any]) -> str:
    """A cell in a line."""
    name = f"{row['variant']}, {row['rate']:g} a second"
    if "error" in row:
        return f"{name}: {row['error']}"
    times = ", ".join(
        f"{one} p50 {row[f'{one}_ms']['p50']:,.1f} p99 {row[f'{one}_ms']['p99']:,.1f}"
        for one in LATENCIES
    )
    return (
        f"{name}: {row['completed']} of {row['prompts']} requests in {row['seconds']:.0f} s, "
        f"{row['output_tokens_per_s']:,.0f} tokens/s, good {row['good_requests_per_s']:.2f}/s, "
        f"ms: {times}"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="directory of the model")
    add("--variants", default=DENSE, help="dense, masks' files, kv_cache_dtypes; with commas")
    add("--rates", default="0.5,1", help="requests per second; with commas")
    add("--seconds", type=float, default=90, help="for which requests arrive, at each rate")
    add("--minutes", type=float, default=15, help="that all may take")
    pair = {"type": int, "nargs": 2, "metavar": ("LEAST", "MOST")}
    add("--prompt-tokens", default=(2048, 32768), **pair)
    add("--output-tokens", default=(128, 1024), **pair)
    add("--goodput", nargs="+", default=["ttft:5000", "tpot:50"], help="ms that good requests keep")
    add("--warm-up", type=int, default=4, help="requests before those that are measured")
    add("--seed", type=int, default=0, help="of prompts and arrivals")
    add("--engine-args", metavar="JSON", help="more arguments of every engine")
    add("--commit", help="of the code measured; asked of git when not given")
    add("--out", type=Path, required=True, help="results, as JSON; servers' logs beside them")
    args = parser.parse_args()
    args.rates = [float(rate) for rate in args.rates.split(",")]
    args.variants = args.variants.split(",")
    check_words(args.variants)
    most = args.prompt_tokens[1] + args.output_tokens[1] + ROOM
    args.engine_args = {"max_model_len": most} | parse_engine_args(args.engine_args)
    return args


def main() -> int:
    """Measure every cell and write what there is after each."""
    begin, args = time.monotonic(), parse()
    until = begin + 60 * args.minutes
    leave_in_order(60 * args.minutes + GRACE)
    checkpoint = Checkpoint.open(args.model)
    variants = [served(word, checkpoint) for word in args.variants]
    results = header(KIND, args.commit, "python benchmarks/mixed_load.py") | {
        "load": {
            "model": checkpoint.id,
            **{name: vars(args)[name] for name in LOAD},
        },
        "engine_args": args.engine_args,
        "variants": [
            {"variant": one.name, "engine_args": one.engine_args, "token_bytes": one.token_bytes}
            | ({"mask": describe_mask(load_mask(Path(word)))} if Path(word).suffix else {})
            for word, one in zip(args.variants, variants, strict=True)
        ],
        "cells": [],
    }

    def done(row: dict[str, Any]) -> None:
        results["cells"].append(row)
        results["minutes"] = round((time.monotonic() - begin) / 60, 2)
        save_results(results, args.out)

    with tempfile.TemporaryDirectory() as folder:
        args.tokenizer = str(tokenizer_for(Path(checkpoint.path), Path(folder)))
        for index, one in enumerate(variants):
            now = time.monotonic()
            try:
                run_engine(one, args, now + (until - now) / (len(variants) - index), done)
            except UserError as error:
                CONSOLE.print(f"{one.name}: {error}", style="red")
                done({"variant": one.name, "rate": None, "error": str(error)})
    print(json.dumps(results, indent=1))
    return 0 if all(map(is_whole, results["cells"])) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
