"""What it would cost to answer from pruned prefixes: hits that bring the archive alone.

    PYTHONPATH=benchmarks python -m recall.prefix_accuracy

leank's prefix cache offers dense pages, so a prompt is read exactly with or without a hit. Pruned
pages take less memory and would be found longer, but then what follows them in the prompt reads
them as answers do: kept channels only. Compared here, with the model in transformers and the mask
that comes with it:

    exact         the prompt is read densely, as leank does
    pruned, all   a hit of the whole haystack: only the question reads it pruned
    pruned, half  a hit of half the prompt: the other half and the question read it pruned
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaForCausalLM

from recall.evaluate import BATCH_TOKENS, head_commit, machine
from recall.tasks import TASKS, make_sample
from recall.wilson import interval
from vllm_leank.attention_hook import hooked_attention
from vllm_leank.mask import load_mask
from vllm_leank.mask_resolver import find_masks
from vllm_leank.simulate import SimulatedPruning
from vllm_leank.window import Window

PAGE = 96
"""Tokens by which hits grow: what both page lengths of the recall mask divide."""


def hit_lengths(task: str, prompt_tokens: int) -> dict[str, int]:
    """Tokens that each way takes from the cache; the exact one reads all of the prompt densely."""
    haystack = prompt_tokens - TASKS[task].prompt_tokens
    return {
        "exact": prompt_tokens,
        "pruned, all": haystack // PAGE * PAGE,
        "pruned, half": prompt_tokens // 2 // PAGE * PAGE,
    }


@torch.inference_mode()
def count_exact(
    model: LlamaForCausalLM, keep: torch.Tensor, window: Window, cell: tuple[str, int], count: int
) -> dict[str, int]:
    """Answers without a mistake per way, of the first `count` held-out samples of a cell."""
    task, length = cell
    pruning = SimulatedPruning(window)
    answer_tokens = TASKS[task].answer_tokens
    hits = hit_lengths(task, length - answer_tokens)
    exact = dict.fromkeys(hits, 0)
    size = max(1, BATCH_TOKENS // length)
    for first in range(0, count, size):
        samples = [make_sample(task, length, s) for s in range(first, min(first + size, count))]
        rows = [sample.prompt_token_ids + sample.answer_token_ids for sample in samples]
        tokens = torch.tensor(rows, device=model.device)
        for name, hit in hits.items():
            cache = DynamicCache()
            pruning.keep = None
            with hooked_attention(model, pruning):
                start = model(tokens[:, :hit], past_key_values=cache, logits_to_keep=1).logits
                pruning.keep = keep
                rest = model(
                    tokens[:, hit:-1], past_key_values=cache, logits_to_keep=answer_tokens
                ).logits
            # The first answer token comes out of the prompt's last one, wherever that was read.
            logits = torch.cat([start, rest], dim=1)[:, -answer_tokens:]
            exact[name] += int((logits.argmax(-1) == tokens[:, -answer_tokens:]).all(1).sum())
    return exact


def main() -> None:
    """Measure every cell and write the results."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=here / "model", help="directory of the model")
    add("--mask", type=Path, help="mask file; by default the one shipped for the model")
    add("--out", type=Path, default=here.parent / "results" / "recall_prefix_accuracy.json")
    add("--samples", type=int, default=64, help="per task and length")
    add("--lengths", type=int, nargs="+", default=(1024, 2048, 4096))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--commit", help="of the code measured; asked of git when not given")
    args = parser.parse_args()

    begin = time.monotonic()
    mask = load_mask(args.mask or find_masks(str(args.model))[0].path)
    window = Window(mask.sink, mask.recent)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    keep = torch.tensor(mask.keep, device=args.device)
    cells = []
    for task in TASKS:
        for length in args.lengths:
            exact = count_exact(model, keep, window, (task, length), args.samples)
            cells.append({"task": task, "length": length, "n": args.samples, "exact": exact})
            print(task, length, exact, flush=True)
    total = args.samples * len(cells)
    ways = {}
    for name in cells[0]["exact"]:
        right = sum(cell["exact"][name] for cell in cells)
        low, high = interval(right, total)
        ways[name] = {"accuracy": right / total, "interval": [round(low, 4), round(high, 4)]}
        print(f"{name}: {100 * right / total:.1f} ({100 * low:.1f}-{100 * high:.1f})")
    result = {
        "what": "greedy exact match of whole answers, prompts read behind pruned prefixes",
        "machine": machine(args.device),
        "commit": args.commit or head_commit(),
        "command": shlex.join(["python", "-m", "recall.prefix_accuracy", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - begin, 1),
        "mask": {"sha256": mask.sha256, "k_kept": round(mask.k_kept, 4)},
        "window": {"sink": window.sink, "recent": window.recent},
        "ways": ways,
        "cells": cells,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
