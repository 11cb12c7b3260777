"""Exact match of the recall model through vLLM: with leank, or dense for comparison.

    PYTHONPATH=benchmarks python -m recall.evaluate_engine --out results.json
    PYTHONPATH=benchmarks python -m recall.evaluate_engine --dense --out results.json

Prompts and answers are those of `recall.evaluate`; here the engine writes the answers, greedily.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch
from vllm import LLM, SamplingParams
from vllm import __version__ as vllm_version

from recall.evaluate import LENGTHS, head_commit, machine
from recall.tasks import TASKS, make_sample

SLACK = 64  # tokens of the model's length beyond the longest sample


def main() -> None:
    """Measure every cell and write the results."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dense", action="store_true", help="vLLM's own attention, not leank")
    parser.add_argument("--mask", help="mask file; by default the one shipped for the model")
    parser.add_argument("--archive-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=256, help="per task and length")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--commit", help="of the code measured; asked of git when not given")
    args = parser.parse_args()

    backend = {}
    if not args.dense:
        options = {"archive_dtype": args.archive_dtype}
        options |= {"mask": args.mask} if args.mask else {}
        backend = {"attention_backend": "leank", "additional_config": {"leank": options}}
    llm = LLM(
        str(here / "model"),
        dtype=args.dtype,
        max_model_len=max(args.lengths) + SLACK,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=args.gpu_memory_utilization,
        **backend,
    )
    start = time.monotonic()
    cells = []
    for task in TASKS:
        for length in args.lengths:
            exact = count_exact(llm, task, length, args.samples)
            cells.append({"task": task, "length": length, "n": args.samples, "exact": exact})
            print(task, length, exact, args.samples, flush=True)
    result = {
        "what": "greedy exact match of whole answers through the engine, held-out samples",
        "attention": "dense" if args.dense else "leank",
        "mask": None if args.dense else mask_of(llm),
        "machine": machine("cuda" if torch.cuda.is_available() else "cpu") | {"vllm": vllm_version},
        "dtype": str(llm.llm_engine.vllm_config.model_config.dtype),
        "commit": args.commit or head_commit(),
        "command": shlex.join(["python", "-m", "recall.evaluate_engine", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - start, 1),
        "cells": cells,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def count_exact(llm: LLM, task: str, length: int, count: int) -> int:
    """How many of the first `count` held-out samples the engine answers without a mistake."""
    samples = [make_sample(task, length, seed) for seed in range(count)]
    params = SamplingParams(
        max_tokens=TASKS[task].answer_tokens, temperature=0, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": sample.prompt_token_ids} for sample in samples]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return sum(
        list(output.outputs[0].token_ids) == sample.answer_token_ids
        for output, sample in zip(outputs, samples, strict=True)
    )


def mask_of(llm: LLM) -> dict[str, object]:
    """The mask in use and the dense window."""
    from vllm_leank.settings import load_settings

    settings = load_settings(llm.llm_engine.vllm_config)
    mask, window = settings.mask, settings.window
    return {
        "model": mask.model,
        "method": mask.provenance["method"],
        "sha256": mask.sha256,
        "k_kept": round(mask.k_kept, 4),
        "v_kept": round(mask.v_kept, 4),
        "sink": window.sink,
        "recent": window.recent,
        "archive_dtype": "fp8" if settings.plan.archive_itemsize == 1 else "auto",
    }


if __name__ == "__main__":
    main()
