"""Exact match of the recall model with dense attention, per task and length.

    PYTHONPATH=benchmarks python -m recall.evaluate --model benchmarks/recall/model

An answer counts when every one of its tokens is the most likely one after the prompt and the
tokens before it, which is what greedy decoding would write. One forward pass shows that.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import LlamaForCausalLM

from recall.tasks import TASKS, make_sample

LENGTHS = (1024, 2048, 4096, 8192, 16384)
BATCH_TOKENS = 131072


@torch.inference_mode()
def count_exact(model: LlamaForCausalLM, task: str, length: int, seeds: range) -> int:
    """How many of the samples with these seeds are answered without a mistake."""
    exact = 0
    size = max(1, BATCH_TOKENS // length)
    answer_tokens = TASKS[task].answer_tokens
    for first in range(seeds.start, seeds.stop, size):
        some = range(first, min(first + size, seeds.stop))
        samples = [make_sample(task, length, seed) for seed in some]
        rows = [sample.prompt_token_ids + sample.answer_token_ids for sample in samples]
        tokens = torch.tensor(rows, device=model.device)
        logits = model(tokens, use_cache=False, logits_to_keep=answer_tokens + 1).logits
        right = logits[:, :-1].argmax(-1) == tokens[:, -answer_tokens:]
        exact += int(right.all(1).sum())
    return exact


def machine(device: str) -> dict[str, str]:
    """What the numbers were measured on and with."""
    return {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def head_commit() -> str:
    """The commit of the working tree."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    """Measure every cell and write the results."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=here / "model", help="directory of the model")
    parser.add_argument("--out", type=Path, default=here.parent / "results" / "recall_dense.json")
    parser.add_argument("--samples", type=int, default=256, help="per task and length")
    parser.add_argument("--first-seed", type=int, default=0, help="of the held-out split")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of the code measured; asked of git when not given")
    args = parser.parse_args()

    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = model.to(args.device).eval()
    seeds = range(args.first_seed, args.first_seed + args.samples)
    start = time.monotonic()
    cells = []
    for task in args.tasks:
        for length in args.lengths:
            exact = count_exact(model, task, length, seeds)
            cells.append({"task": task, "length": length, "n": len(seeds), "exact": exact})
            cells[-1]["accuracy"] = exact / len(seeds)
        print(
            task,
            *(
                f"{cell['length']}: {cell['accuracy']:.4f}"
                for cell in cells
                if cell["task"] == task
            ),
            flush=True,
        )
    result = {
        "what": "dense attention, greedy exact match of whole answers, held-out samples, bf16",
        "machine": machine(args.device),
        "commit": args.commit or head_commit(),
        "command": shlex.join(["python", "-m", "recall.evaluate", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - start, 1),
        "first_seed": args.first_seed,
        "cells": cells,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
