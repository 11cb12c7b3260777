"""Whether the same K channels matter for every task: LeanK's premise, on the recall model.

    PYTHONPATH=benchmarks python -m recall.importance --out results.json

Channels are scored as `leank mask calibrate --score energy` does it, once per task and half of its
samples. Compared are scores of two tasks, and of the two halves of one task, which is as alike as
they can be: Pearson's correlation over all channels of the model, Spearman's within each head (mean
over the heads that look far at all), and how much two masks have in common (intersection over
union).
"""

import argparse
import itertools
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

from recall.evaluate import head_commit, machine
from recall.tasks import TASKS, make_sample
from vllm_leank.core.window import Window
from vllm_leank.mask.select_channels import select_channels
from vllm_leank.offline.calibrate import HeadStatistics, measure_heads

FAR_MASS = 0.01
"""Attention on far tokens, at least, of a head whose channels are ranked."""


def prompts(task: str, half: int, count: int, length: int) -> list[list[int]]:
    """Samples of the training split with their answers; the halves have none in common."""
    seeds = range(half * count, (half + 1) * count)
    samples = [make_sample(task, length, seed, "train") for seed in seeds]
    return [sample.prompt_token_ids + sample.answer_token_ids for sample in samples]


def compare(one: HeadStatistics, two: HeadStatistics, ratio: float) -> dict[str, float]:
    """How alike the scores of two sets of samples are."""
    scores = one.scores(), two.scores()
    looking = (one.far_mass > FAR_MASS) & (two.far_mass > FAR_MASS)
    first, second = (score[looking] for score in scores)
    ranks = [np.corrcoef(rank(a), rank(b))[0, 1] for a, b in zip(first, second, strict=True)]
    kept = [select_channels(score, ratio, 32) for score in scores]
    return {
        "pearson": round(float(np.corrcoef(*(score.ravel() for score in scores))[0, 1]), 4),
        "spearman_in_heads": round(float(np.mean(ranks)), 4),
        "mask_overlap": round(float((kept[0] & kept[1]).sum() / (kept[0] | kept[1]).sum()), 4),
    }


def rank(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Place of each value in their order."""
    return np.argsort(np.argsort(values))


def main() -> None:
    """Measure every pair, print a table and write the results."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=here / "model", help="directory of the model")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    parser.add_argument("--samples", type=int, default=8, help="per task and half")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--query-tokens", type=int, default=16, help="last tokens that ask")
    parser.add_argument("--ratio", type=float, default=0.7, help="pruned by the masks compared")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of the code measured; asked of git when not given")
    args = parser.parse_args()

    begin = time.monotonic()
    window = Window(64, 256)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = model.to(args.device).eval()
    measured = {
        (task, half): measure_heads(
            model, prompts(task, half, args.samples, args.length), window, args.query_tokens
        )
        for task in TASKS
        for half in (0, 1)
    }
    pairs = []
    for one, two in itertools.combinations_with_replacement(TASKS, 2):
        alike = compare(measured[one, 0], measured[two, 1], args.ratio)
        pairs.append({"tasks": [one, two], **alike})
    print_table(pairs)
    result = {
        "what": "channel importance compared between tasks, and between halves of one task",
        "machine": machine(args.device),
        "commit": args.commit or head_commit(),
        "command": shlex.join(["python", "-m", "recall.importance", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - begin, 1),
        "window": {"sink": window.sink, "recent": window.recent},
        "far_mass_of_ranked_heads": FAR_MASS,
        "pairs": pairs,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def print_table(pairs: list[dict[str, object]]) -> None:
    """A row per pair of tasks."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("task", "and", "Pearson", "Spearman in heads", "masks in common"):
        table.add_column(name, no_wrap=True)
    for pair in pairs:
        one, two = pair["tasks"]
        numbers = (pair[key] for key in ("pearson", "spearman_in_heads", "mask_overlap"))
        table.add_row(one, "itself" if one == two else two, *(f"{value:.3f}" for value in numbers))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
