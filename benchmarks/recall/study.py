"""How much recall masks keep: exact match of the recall model's answers with pruned far tokens.

    PYTHONPATH=benchmarks:. python -m recall.study

Prompts are read with dense attention. Answer tokens read the keys from `sink` to their boundary in
the kept channels only; where a head keeps none, they do not see those keys. As in
`recall.evaluate`, an answer counts when all its tokens are the most likely ones.

Compared are the mask that ships, masks by the rule of `leank mask calibrate` at several ratios,
two other rules at 70% (raw energy on training samples only), and random channels in the numbers
that the shipped mask keeps per head.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM

from recall.evaluate import BATCH_TOKENS, head_commit, machine
from recall.tasks import TASKS, make_sample
from vllm_leank.attention_hook import hooked_attention
from vllm_leank.calibrate import HeadStatistics, head_shares, measure_heads
from vllm_leank.mask import Mask, load_mask
from vllm_leank.select_channels import select_channels
from vllm_leank.simulate import SimulatedPruning, ThinK
from vllm_leank.window import Window

SEEDS = {"train": 1000, "eval": 0}
"""First seed of a split: calibration uses the first ones of `train`."""
RATIOS = (0.3, 0.5, 0.6, 0.8, 0.9)
RULE = "far mass x energy share"


def calibration_prompts(count: int = 24) -> list[list[int]]:
    """The lines of `masks/README.md`: prompts with their answers, from the training split."""
    prompts = []
    for seed in range(count):
        task, length = list(TASKS)[seed % 4], (1024, 2048, 4096)[seed // 4 % 3]
        sample = make_sample(task, length, seed, "train")
        prompts.append(sample.prompt_token_ids + sample.answer_token_ids)
    return prompts


@torch.inference_mode()
def count_exact(
    model: LlamaForCausalLM,
    masks: Mapping[str, torch.Tensor | float | None],
    window: Window,
    cell: tuple[str, str, int],
    count: int,
) -> dict[str, int]:
    """Exact answers per mask of `count` samples of a cell: split, task, length.

    A mask is bool `[L, H, D]`, None for dense attention, or the ratio that ThinK prunes. The
    prompts are read once. Their first answer token needs no pruned key.
    """
    split, task, length = cell
    exact = dict.fromkeys(masks, 0)
    pruning, think = SimulatedPruning(window), ThinK()
    size = max(1, BATCH_TOKENS // length)
    seeds = range(SEEDS[split], SEEDS[split] + count)
    for first in range(0, count, size):
        samples = [make_sample(task, length, s, split) for s in seeds[first : first + size]]
        prompts = torch.tensor([s.prompt_token_ids for s in samples], device=model.device)
        answers = torch.tensor([s.answer_token_ids for s in samples], device=model.device)
        cache = DynamicCache()
        with hooked_attention(model, think):
            start = model(prompts, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        for name, mask in masks.items():
            pruning.keep = think.keep(mask) if isinstance(mask, float) else mask
            with hooked_attention(model, pruning):
                rest = model(answers[:, :-1], past_key_values=cache).logits.argmax(-1)
            cache.crop(1 - answers.shape[1])
            right = torch.cat([start, rest], dim=1) == answers
            exact[name] += int(right.all(1).sum())
    return exact


def rules(heads: HeadStatistics) -> dict[str, np.ndarray]:
    """Channel scores `[L, H, D]` of the rules that are compared."""
    return {
        "energy": heads.energy,
        "energy share": head_shares(heads.energy),
        RULE: heads.scores(),
    }


def random_like(keep: np.ndarray, seed: int) -> np.ndarray:
    """Random channels, as many per head as `keep` `[L, H, D]` has."""
    rng = np.random.default_rng(seed)
    return rng.permuted(keep, axis=-1)


def kept_shares(keep: np.ndarray) -> dict[str, object]:
    """What a mask keeps: channels per head, share of K and of V."""
    counts = keep.sum(-1)
    return {
        "kept": counts.tolist(),
        "k_kept": round(float(keep.mean()), 4),
        "v_kept": round(float((counts > 0).mean()), 4),
    }


def report(cells: Iterable[dict[str, object]], names: Iterable[str]) -> None:
    """Print the accuracy of each mask in % over each row of cells."""
    for cell in cells:
        parts = (f"{name}: {100 * cell['exact'][name] / cell['n']:.1f}" for name in names)
        print(cell["split"], cell["task"], cell["length"], ", ".join(parts), flush=True)


def main() -> None:
    """Measure every cell and write the results."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=here / "model", help="directory of the model")
    parser.add_argument("--mask", type=Path, default=here.parents[1] / "masks/leank/recall.yaml")
    parser.add_argument(
        "--out", type=Path, default=here.parent / "results" / "recall_mask_study.json"
    )
    parser.add_argument("--samples", type=int, default=256, help="per held-out cell")
    parser.add_argument("--train-samples", type=int, default=16, help="per cell for the choice")
    parser.add_argument("--calibration-prompts", type=int, default=24)
    parser.add_argument("--query-tokens", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=(1024, 2048, 4096, 8192))
    parser.add_argument("--random", type=int, default=3, help="random masks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of the code measured; asked of git when not given")
    args = parser.parse_args()

    begin = time.monotonic()
    shipped: Mask = load_mask(args.mask)
    window = Window(shipped.sink, shipped.recent)
    exact_model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    exact_model = exact_model.to(args.device).eval()
    prompts = calibration_prompts(args.calibration_prompts)
    scores = rules(measure_heads(exact_model, prompts, window, args.query_tokens))
    # Loaded anew: a conversion would round RoPE's frequencies, too.
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = model.to(args.device).eval()

    keeps = {f"{name}, 0.7": select_channels(score, 0.7, 32) for name, score in scores.items()}
    choice = ["dense", *keeps]
    keeps |= {f"{RULE}, {ratio}": select_channels(scores[RULE], ratio, 32) for ratio in RATIOS}
    same = bool((keeps[f"{RULE}, 0.7"] == shipped.keep).all())
    keeps["shipped"] = shipped.keep
    keeps |= {f"random {seed}": random_like(shipped.keep, seed) for seed in range(args.random)}
    masks = {name: torch.tensor(keep, device=args.device) for name, keep in keeps.items()}

    skipped = ["energy, 0.7", *([f"{RULE}, 0.7"] if same else [])]

    cells = []
    for split, names, count in (
        ("train", choice, args.train_samples),
        ("eval", ["dense", *(name for name in masks if name not in skipped)], args.samples),
    ):
        some = {name: masks.get(name) for name in names}
        for task in TASKS:
            for length in args.lengths:
                exact = count_exact(model, some, window, (split, task, length), count)
                cells.append({"split": split, "task": task, "length": length, "n": count})
                cells[-1]["exact"] = exact
                report(cells[-1:], names)
    result = {
        "what": "greedy exact match of whole answers, far tokens pruned for answer tokens, bf16",
        "machine": machine(args.device),
        "commit": args.commit or head_commit(),
        "command": shlex.join(["python", "-m", "recall.study", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - begin, 1),
        "window": {"sink": window.sink, "recent": window.recent},
        "shipped_is_recomputed": same,
        "first_seeds": SEEDS,
        "masks": {name: kept_shares(keep) for name, keep in keeps.items()},
        "cells": cells,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
