"""How often prompts find their beginnings in the prefix cache: plain vLLM against leank.

    PYTHONPATH=benchmarks python -m recall.prefix_hits

The recall model in vLLM engines, with pools of equal bytes. Two workloads:

    documents       documents that several questions are asked of, in any order, all at once
    conversations   each turn repeats the prompt and the answer before it and adds to them; all
                    conversations take a turn at once

Then, how many questions about one document run at once in the smallest pool.

A pool's size is given in tokens of plain vLLM. `limit` is the share that a pool without end would
find: with leank, turns find earlier prompts but not earlier answers, whose K and V were computed
with pruned attention.
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
from recall.evaluate_engine import MODEL
from recall.vocab import BOS, WORDS
from vllm_leank.compat import vllm_version
from vllm_leank.layout import plan_cache
from vllm_leank.mask import load_mask
from vllm_leank.mask_resolver import find_masks

DENSE_BLOCK = 32
TOKEN_BYTES = 12288
"""K and V of the recall model in fp32."""


class Workload:
    """Prompts in rounds; a round's answers may be part of the next."""

    def __init__(self, seed: int, output_tokens: int):
        self.rng = np.random.default_rng(seed)
        self.output_tokens = output_tokens

    def text(self, tokens: int) -> list[int]:
        return [int(token) for token in self.rng.choice(WORDS, size=tokens)]

    def play(self, running: Engine) -> None:
        """Ask everything."""
        raise NotImplementedError


class Documents(Workload):
    """`count` documents of `tokens`, of each of which `questions` are asked."""

    def __init__(self, count: int, tokens: int, questions: int, output_tokens: int):
        super().__init__(1, output_tokens)
        documents = [[BOS, *self.text(tokens)] for _ in range(count)]
        order = self.rng.permutation(np.repeat(np.arange(count), questions))
        self.prompts = [documents[index] + self.text(30) for index in order]

    def play(self, running: Engine) -> None:
        running.generate(self.prompts, self.output_tokens)


class Conversations(Workload):
    """`count` conversations of `turns`, which add `tokens` each."""

    def __init__(self, count: int, turns: int, tokens: int, output_tokens: int):
        super().__init__(2, output_tokens)
        self.turns = [[self.text(tokens) for _ in range(count)] for _ in range(turns)]

    def play(self, running: Engine) -> None:
        history = [[BOS] for _ in self.turns[0]]
        for said in self.turns:
            prompts = [past + new for past, new in zip(history, said, strict=True)]
            answers = running.generate(prompts, self.output_tokens)
            history = [past + new for past, new in zip(prompts, answers, strict=True)]


WORKLOADS = {
    "documents": lambda: Documents(count=8, tokens=2000, questions=6, output_tokens=64),
    "conversations": lambda: Conversations(count=8, turns=5, tokens=400, output_tokens=64),
}
MAX_MODEL_LEN = 2560
ENDLESS = 200_000


def measure(workload: str, leank: bool, pool_tokens: int, seqs: int) -> dict[str, Any]:
    """One engine through one workload."""
    size = TOKEN_BYTES * DENSE_BLOCK
    arguments: dict[str, Any] = {"block_size": DENSE_BLOCK}
    if leank:
        kept = load_mask(find_masks(MODEL)[0].path).kept_counts.tolist()
        size, arguments = plan_cache(kept, 128, 4).block_bytes, {}
    blocks = pool_tokens * TOKEN_BYTES // size
    with engine(
        MODEL,
        {} if leank else None,
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
        if workload == "one document":
            document = Documents(count=1, tokens=2000, questions=64, output_tokens=64)
            most = running.most_running(document.prompts, document.output_tokens)
        else:
            most = None
            WORKLOADS[workload]().play(running)
        return {
            "workload": workload,
            "engine": "leank" if leank else "dense",
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
        for leank in (False, True):
            for pool in (ENDLESS, *args.pools):
                row = measure(workload, leank, pool, args.max_num_seqs)
                yield row
    for leank in (False, True):
        yield measure("one document", leank, min(args.pools), seqs=64)


def print_table(measured: list[dict[str, Any]]) -> None:
    """Shares found, in %."""
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("workload", "pool, dense tokens", "dense", "leank"):
        table.add_column(name, justify="left" if name == "workload" else "right")
    shares = {
        (row["workload"], row["pool_tokens"], row["engine"]): row["found"] / row["asked"]
        for row in measured
        if row["most_running"] is None
    }
    for workload, pool in dict.fromkeys(key[:2] for key in shares):
        cells = (f"{100 * shares[workload, pool, one]:.1f}" for one in ("dense", "leank"))
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
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
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
