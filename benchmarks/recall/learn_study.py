"""Learned masks of the recall model against every other way to choose channels, over ratios.

    PYTHONPATH=benchmarks python -m recall.learn_study --masks masks-learned

Stage 1 runs once for each weight of the regulariser, and from its end stage 2 for each ratio. All
masks are then measured as in `recall.pruned_answers`: dense prompts, answers with pruned far
tokens, whole answers greedily right.

Training samples come from the training split, tasks in turn. Compared are

    reg R, and without stage 2      LeanK's two stages, and the mask of stage 1's factors
    calibrated                      the rule of `leank mask calibrate --score energy`
    global energy                   the same without far attention mass
    uniform energy                  the same number of channels in every head
    slow heads                      whole heads, by their high-frequency share
    ThinK                           chosen anew for every prompt
    random                          by chance
"""

import argparse
import itertools
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from baselines.global_energy import global_energy
from baselines.random_channels import random_channels
from baselines.slow_heads import slow_heads
from baselines.uniform_energy import uniform_energy
from transformers import LlamaForCausalLM

from recall.evaluate import head_commit, machine
from recall.pruned_answers import (
    SEEDS,
    calibration_prompts,
    count_exact,
    kept_shares,
    report,
)
from recall.tasks import TASKS, make_sample
from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.learn.display import Display
from vllm_leank.learn.distillation import Distiller
from vllm_leank.learn.stages import Progress, Recipe, Selection, Stage, run_stage
from vllm_leank.mask.file import save_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.select_channels import select_channels
from vllm_leank.offline.calibrate import measure_heads
from vllm_leank.offline.prompts import Sample

FIRST_SEED = 100_000
"""Of the samples to learn on: other ones than calibration and the choice of rules use."""


class RecallSource:
    """Samples of the tasks in turn, every doubling of the length equally likely."""

    def __init__(self, tasks: Sequence[str], lengths: tuple[int, int], seed: int):
        self.tasks = tasks
        self.lengths = lengths
        self.seed = seed

    def __call__(self, number: int) -> Sample:
        """Sample `number`, from 0 without end."""
        rng = np.random.default_rng([self.seed, number])
        length = int(np.exp(rng.uniform(*np.log(self.lengths))))
        task = self.tasks[number % len(self.tasks)]
        sample = make_sample(task, length, FIRST_SEED + number, "train")
        return Sample(sample.prompt_token_ids, sample.answer_token_ids)


def learn_masks(
    distiller: Distiller, source: RecallSource, recipe: Recipe, ratios: Sequence[float], align: int
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Masks bool `[L, H, D]` by name, and how the learning went."""
    geometry = Geometry.from_hf_config(distiller.model.config)
    shape = geometry.shape
    keeps = {}
    log: dict[str, object] = {}
    with Display() as display:

        def run(name: str, stage: Stage, factors: torch.Tensor) -> Progress:
            progress = Progress.start(factors)
            display.begin(name, stage.steps, progress)
            begin = time.monotonic()
            run_stage(stage, progress, distiller, source, on_step=lambda: display.step(progress))
            tenth = max(1, stage.steps // 10)
            log[name] = {
                "seconds": round(time.monotonic() - begin, 1),
                "losses": [
                    round(math.fsum(part) / len(part), 6)
                    for at in range(0, stage.steps, tenth)
                    if (part := progress.losses[at : at + tenth])
                ],
                "mean_factor": round(progress.means[-1], 4),
                "at_0": round(float((progress.factors == 0).float().mean()), 4),
                "at_1": round(float((progress.factors == 1).float().mean()), 4),
            }
            return progress

        ones = torch.ones(shape, device=distiller.model.device)
        first = run("stage 1", recipe.first(), ones)
        for ratio in ratios:
            selection = Selection(ratio, align)
            second = run(f"stage 2, {ratio}", recipe.second(selection), first.factors)
            keeps[f"reg {recipe.reg}, {ratio}"] = selection.keep(second.scores())
            keeps[f"reg {recipe.reg}, without stage 2, {ratio}"] = selection.keep(first.scores())
    heads = first.factors.flatten(0, 1).tolist()
    log["factors"] = [[round(value, 3) for value in head] for head in heads]
    return keeps, log


def main() -> None:
    """Learn, measure every cell and write the results."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=here / "model", help="directory of the model")
    add("--out", type=Path, default=here.parent / "results" / "recall_learn_study.json")
    add("--masks", type=Path, help="directory for the learned mask files")
    add("--ratios", type=float, nargs="+", default=(0.5, 0.7, 0.8, 0.85, 0.9, 0.94))
    add("--align", type=int, default=32)
    add("--sink", type=int, default=64)
    add("--recent", type=int, default=256)
    add("--steps", type=int, default=800, help="of stage 1")
    add("--lr", type=float, default=0.02)
    add("--reg", type=float, nargs="+", default=(0.06, 0.6))
    add("--seed", type=int, default=0)
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="to learn on")
    add("--train-lengths", type=int, nargs=2, default=(1024, 8192), help="shortest and longest")
    add("--samples", type=int, default=256, help="per held-out cell")
    add("--split", choices=SEEDS, default="eval", help="to measure on")
    add("--lengths", type=int, nargs="+", default=(1024, 2048, 4096, 8192))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--commit", help="of the code measured; asked of git when not given")
    args = parser.parse_args()

    begin = time.monotonic()
    window = Window(args.sink, args.recent)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = model.to(args.device).eval()
    source = RecallSource(args.tasks, tuple(args.train_lengths), args.seed)
    keeps, logs = {}, {}
    for reg in args.reg:
        recipe = Recipe(args.steps, args.lr, reg)
        found, logs[f"reg {reg}"] = learn_masks(
            Distiller(model, window), source, recipe, args.ratios, args.align
        )
        keeps |= found
    learning_seconds = round(time.monotonic() - begin, 1)

    exact_model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    exact_model = exact_model.to(args.device).eval()
    heads = measure_heads(exact_model, calibration_prompts(), window, 16)
    geometry = Geometry.from_hf_config(model.config)
    for ratio in args.ratios:
        keeps |= {
            f"calibrated, {ratio}": select_channels(heads.scores(), ratio, args.align),
            f"global energy, {ratio}": global_energy(heads.energy, ratio, args.align),
            f"uniform energy, {ratio}": uniform_energy(heads.energy, ratio),
            f"slow heads, {ratio}": slow_heads(heads.energy, geometry, ratio),
            f"random, {ratio}": random_channels(heads.energy.shape, ratio, args.align, args.seed),
        }
    masks = {"dense": None}
    masks |= {name: torch.tensor(keep, device=args.device) for name, keep in keeps.items()}
    masks |= {f"ThinK, {ratio}": ratio for ratio in args.ratios}
    cells = []
    for task in TASKS:
        for length in args.lengths:
            exact = count_exact(model, masks, window, (args.split, task, length), args.samples)
            cells.append({"split": args.split, "task": task, "length": length, "n": args.samples})
            cells[-1]["exact"] = exact
            report(cells[-1:], masks)
    total = args.samples * len(cells)
    means = {
        name: round(100 * sum(cell["exact"][name] for cell in cells) / total, 3) for name in masks
    }
    print(json.dumps(means, indent=1))

    command = shlex.join(["python", "-m", "recall.learn_study", *sys.argv[1:]])
    training = {
        "steps": args.steps,
        "lr": args.lr,
        "seed": args.seed,
        "tasks": list(args.tasks),
        "lengths": list(args.train_lengths),
    }
    result = {
        "what": "greedy exact match of whole answers, far tokens pruned for answer tokens, bf16",
        "machine": machine(args.device),
        "commit": args.commit or head_commit(),
        "command": command,
        "seconds": round(time.monotonic() - begin, 1),
        "learning_seconds": learning_seconds,
        "window": {"sink": window.sink, "recent": window.recent},
        "align": args.align,
        "training": training,
        "learning": logs,
        "first_seeds": SEEDS,
        "mean_accuracy": means,
        "masks": {name: kept_shares(keep) for name, keep in keeps.items()},
        "cells": cells,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    if args.masks:
        args.masks.mkdir(parents=True, exist_ok=True)
        for reg, ratio in itertools.product(args.reg, args.ratios):
            mask = Mask.from_keep(
                keeps[f"reg {reg}, {ratio}"],
                geometry,
                model="leank/recall",
                align=args.align,
                sink=window.sink,
                recent=window.recent,
                provenance={
                    "method": "learn",
                    "ratio": ratio,
                    "reg": reg,
                    **training,
                    "command": command,
                },
            )
            save_mask(mask, args.masks / f"recall-{ratio}-reg{reg}.yaml", overwrite=True)


if __name__ == "__main__":
    main()
