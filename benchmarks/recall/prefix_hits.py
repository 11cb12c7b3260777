"""How often prompts find their beginnings in the prefix cache: plain vLLM, leank, and leank reading
prompts pruned.

    PYTHONPATH=benchmarks python -m recall.prefix_hits

The recall model in vLLM engines, with pools of equal bytes. Two workloads:

    documents       documents that several questions are asked of, in any order, all at once
    conversations   each turn repeats the prompt and the answer before it and adds to them; all
                    conversations take a turn at once

Then, how many questions about one document run at once in the smallest pool.

A pool's size is given in tokens of plain vLLM. `limit` is the share that a pool without end would
find: with leank, turns find earlier prompts but not earlier answers, whose K and V were computed
with pruned attention; where prompts are read pruned, both.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from recall.engine import Engine, engine
from recall.evaluate import head_commit, machine
from recall.evaluate_engine import ENGINES, MODEL
from recall.vocab import BOS, WORDS
from vllm_leank.core.page_sizes import plan_cache
from vllm_leank.mask.file import load_mask
from vllm_leank.mask.lookup import find_masks
from vllm_leank.serving.vllm.versions import vllm_version

DENSE_BLOCK = 32
MAX_MODEL_LEN = 2560
OUTPUT_TOKENS = 64
ENDLESS = 200_000
"""Tokens of a pool that never gets full."""


def text(rng: np.random.Generator, tokens: int) -> list[int]:
    """Random words."""
    return [int(token) for token in rng.choice(WORDS, size=tokens)]


def document_prompts(count: int, questions: int) -> list[list[int]]:
    """As many questions about each of `count` documents, in any order."""
    rng = np.random.default_rng(1)
    documents = [[BOS, *text(rng, 2000)] for _ in range(count)]
    order = rng.permutation(np.repeat(np.arange(count), questions))
    return [documents[index] + text(rng, 30) for index in order]


def documents(running: Engine) -> None:
    """8 documents, 6 questions about each."""
    running.generate(document_prompts(8, 6), OUTPUT_TOKENS)


def conversations(running: Engine) -> None:
    """8 conversations of 5 turns."""
    rng = np.random.default_rng(2)
    turns = [[text(rng, 400) for _ in range(8)] for _ in range(5)]
    history = [[BOS] for _ in turns[0]]
    for said in turns:
        prompts = [past + new for past, new in zip(history, said, strict=True)]
        answers = running.generate(prompts, OUTPUT_TOKENS)
        history = [past + new for past, new in zip(prompts, answers, strict=True)]


def one_document(running: Engine) -> int:
    """64 questions about one document; how many ran at once."""
    return running.most_running(document_prompts(1, 64), OUTPUT_TOKENS)


COMPARED = "dense", "leank", "leank-pruned"
"""Names of `evaluate_engine.ENGINES`."""

WORKLOADS = {"documents": documents, "conversations": conversations, "one document": one_document}


def measure(workload: str, name: str, pool_tokens: int, seqs: int) -> dict[str, Any]:
    """One engine through one workload."""
    leank = ENGINES[name]
    mask = load_mask(find_masks(MODEL)[0].path)
    plan = plan_cache(mask.profiles, mask.geometry.head_dim, itemsize=4)
    dense = plan.dense_token_bytes * DENSE_BLOCK
    size = dense if leank is None else plan.block_bytes
    arguments: dict[str, Any] = {"block_size": DENSE_BLOCK} if leank is None else {}
    blocks = pool_tokens * plan.dense_token_bytes // size
    with engine(
        MODEL,
        leank,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=seqs,
        max_num_batched_tokens=1024,
        num_gpu_blocks_override=blocks,
        enable_prefix_caching=True,
        enforce_eager=True,
        gpu_memory_utilization=0.4,
        disable_log_stats=False,
        **arguments,
    ) as running:
        begin = time.monotonic()
        most = WORKLOADS[workload](running)
        return {
            "workload": workload,
            "engine": name,
            "pool_tokens": pool_tokens,
            "pool_bytes": blocks * size,
            "asked": running.counter("vllm:prefix_cache_queries"),
            "found": running.counter("vllm:prefix_cache_hits"),
            "preemptions": running.counter("vllm:num_preemptions"),
            "most_running": most,
            "seconds": round(time.monotonic() - begin, 1),
        }


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every engine, without end first."""
    for workload in args.workloads:
        for name in args.engines:
            for pool in (ENDLESS, *args.pools):
                yield measure(workload, name, pool, args.max_num_seqs)
    for name in args.engines:
        yield measure("one document", name, min(args.pools), seqs=64)


def print_table(measured: list[dict[str, Any]]) -> None:
    """Shares found, in %."""
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    engines = list(dict.fromkeys(row["engine"] for row in measured))
    for name in ("workload", "pool, dense tokens", *engines):
        table.add_column(name, justify="left" if name == "workload" else "right")
    shares = {
        (row["workload"], row["pool_tokens"], row["engine"]): row["found"] / row["asked"]
        for row in measured
        if row["most_running"] is None
    }
    for workload, pool in dict.fromkeys(key[:2] for key in shares):
        cells = (f"{100 * shares[workload, pool, one]:.1f}" for one in engines)
        table.add_row(workload, "limit" if pool == ENDLESS else f"{pool:,}", *cells)
    console.print(table)
    for row in measured:
        if row["most_running"] is not None:
            console.print(
                f"questions about one document at once, {row['engine']}: {row['most_running']}"
            )


def main() -> None:
    """Measure every engine, print a table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parents[1] / "results/recall_prefix_hits.json")
    add("--engines", nargs="+", choices=COMPARED, default=COMPARED)
    add("--workloads", nargs="+", choices=list(WORKLOADS)[:2], default=list(WORKLOADS)[:2])
    add("--pools", type=int, nargs="+", default=(8_000, 12_000, 18_000, 24_000))
    add("--max-num-seqs", type=int, default=8)
    add("--commit", help="of the code measured; asked of git when not given")
    args = parser.parse_args()
    measured = []
    for row in rows(args):
        print(row, file=sys.stderr, flush=True)
        measured.append(row)
    print_table(measured)
    result = {
        "what": "share of prompt tokens found in the prefix cache, pools of equal bytes, fp32",
        "machine": machine("cpu") | {"vllm": vllm_version()},
        "commit": args.commit or head_commit(),
        "command": shlex.join(["python", "-m", "recall.prefix_hits", *sys.argv[1:]]),
        "max_num_seqs": args.max_num_seqs,
        "rows": measured,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
