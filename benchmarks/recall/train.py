"""Train the recall model on one GPU.

    PYTHONPATH=benchmarks python -m recall.train --out benchmarks/recall/model

Rows hold many questions, the loss is on their answers. Training begins with short rows, half of
them periodic sequences from which the model learns to look up by content; the longest row doubles
when lookups succeed. Two small linear heads, dropped after training, read from the middle layers
which value of its key follows each `=`: they teach the model to count, which `multivalue` needs.
The learning rate follows the clock and falls to zero, so a run of any length ends well.
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing import Value
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from recall.network import Recall
from recall.stream import KINDS, make_batch

LOG_STEPS = 25
EASY, READY = 0.8, 0.93
"""Lookup accuracies from which periodic batches become rare, and from which rows grow."""


class Stream(IterableDataset):
    """Batches without end, made in worker processes that follow the curriculum."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.max_length = Value("i", args.first_length)
        self.periodic = Value("d", 0.02 if args.init else 0.5)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        rng = np.random.default_rng([0, self.args.seed, worker.id if worker else 0])
        while True:
            batch = make_batch(rng, self.args.tokens, self.max_length.value, self.periodic.value)
            yield {name: torch.from_numpy(array) for name, array in asdict(batch).items()}

    def advance(self, lookup: float, long_lookup: float, progress: float) -> None:
        """Move on where accuracy allows; by 60% of the time rows are long in any case."""
        if lookup > EASY:
            self.periodic.value = 0.02
        first, last = self.args.first_length, self.args.max_length
        length = self.max_length.value * (2 if long_lookup > READY else 1)
        due = min(1.0, max(0.0, (progress - 0.35) / 0.25))
        self.max_length.value = min(last, max(length, int(first * (last / first) ** due)))


class Meter:
    """Accuracy per name since the last reading; counts stay on the device."""

    def __init__(self, names: tuple[str, ...], device: str):
        self.names = names
        self.right = torch.zeros(len(names), device=device)
        self.seen = torch.zeros(len(names), device=device)

    def add(self, index: torch.Tensor, right: torch.Tensor) -> None:
        """Count `right` `[n]` (bool) under the names with these indexes `[n]`."""
        self.right.index_add_(0, index, right.float())
        self.seen.index_add_(0, index, torch.ones_like(index, dtype=torch.float))

    def read(self) -> dict[str, float | None]:
        """Accuracy per name, None where nothing was counted; starts anew."""
        pairs = zip(self.names, self.right.tolist(), self.seen.tolist(), strict=True)
        self.right.zero_()
        self.seen.zero_()
        return {name: round(right / seen, 4) if seen else None for name, right, seen in pairs}


def learning_rate(args: argparse.Namespace, step: int, progress: float) -> float:
    """Warm up over 200 steps, hold, and fall to zero over the last part of the run."""
    fall = min(1.0, max(0.0, (progress - 1 + args.decay) / args.decay))
    return args.lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * fall))


def make_optimizer(model: Recall, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=args.device == "cuda")


def learn(
    model: Recall,
    optimizer: torch.optim.AdamW,
    batch: dict[str, torch.Tensor],
    ordinal_weight: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step. Returns the answers' loss, and which tokens `[n]` and ordinals `[m]` were right."""
    with torch.autocast(batch["tokens"].device.type, dtype=torch.bfloat16):
        logits, *ordinals = model(batch)
    loss = total = F.cross_entropy(logits.float(), batch["target"])
    if len(batch["ordinal"]):
        for head in ordinals:
            total = total + ordinal_weight * F.cross_entropy(head.float(), batch["ordinal"])
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    right = logits.argmax(-1) == batch["target"]
    return loss.detach(), right, ordinals[-1].argmax(-1) == batch["ordinal"]


def write_curve(path: Path, curve: list[dict]) -> None:
    """Write one point a line."""
    lines = ",\n".join(map(json.dumps, curve))
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def train(args: argparse.Namespace) -> None:
    """Run until the time is used up."""
    torch.manual_seed(args.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every row length
    model = Recall(args.init, args.compile).to(args.device)
    optimizer = make_optimizer(model, args)
    stream = Stream(args)
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=args.workers,
        pin_memory=args.device == "cuda",
        prefetch_factor=4 if args.workers else None,
    )
    every, longest = Meter((*KINDS, "ordinal"), args.device), Meter(KINDS, args.device)
    curve, seen_tokens = [], 0
    start = saved = time.monotonic()
    batches = iter(loader)
    for step in itertools.count(1):
        batch = {k: v.to(args.device, non_blocking=True) for k, v in next(batches).items()}
        seconds = time.monotonic() - start
        if seconds >= args.seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, seconds / args.seconds)
        loss, right, counted = learn(model, optimizer, batch, args.ordinal_weight)
        every.add(batch["kind"], right)
        every.add(torch.full_like(batch["ordinal"], len(KINDS)), counted)
        if batch["tokens"].shape[1] * 2 >= stream.max_length.value:
            longest.add(batch["kind"], right)
        seen_tokens += batch["tokens"].numel()
        if step % LOG_STEPS:
            continue

        accuracy, long_accuracy = every.read(), longest.read()
        curve.append(
            {
                "step": step,
                "seconds": round(seconds, 1),
                "tokens": seen_tokens,
                "max_length": stream.max_length.value,
                "loss": round(loss.item(), 4),
                **accuracy,
                **{f"long_{name}": value for name, value in long_accuracy.items()},
            }
        )
        if step % (4 * LOG_STEPS) == 0:
            print(json.dumps(curve[-1]), flush=True)
        stream.advance(
            accuracy["lookup"] or 0, long_accuracy["lookup"] or 0, seconds / args.seconds
        )
        if time.monotonic() - saved > args.save_seconds:
            model.save(args.out, args.max_shard_size)
            write_curve(args.curve, curve)
            saved = time.monotonic()
    model.save(args.out, args.max_shard_size)
    write_curve(args.curve, curve)
    print(f"{step - 1} steps, {seen_tokens / 1e6:.0f}M tokens, {seconds:.0f} s")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory of the model, written as it learns")
    add("--curve", type=Path, help="training curve (default: training_curve.json beside --out)")
    add("--init", type=Path, help="directory of a model to go on from")
    add("--seconds", type=float, default=310, help="wall-clock training time (default: 310)")
    add("--tokens", type=int, default=65536, help="tokens of a step (default: 65536)")
    add("--first-length", type=int, default=256, help="longest row at first (default: 256)")
    add("--max-length", type=int, default=20480, help="longest row at last (default: 20480)")
    add("--lr", type=float, default=1.5e-3, help="highest learning rate (default: 1.5e-3)")
    add("--decay", type=float, default=0.4, help="share of the run with falling rate (default: .4)")
    add("--ordinal-weight", type=float, default=0.3, help="of the ordinal losses (default: 0.3)")
    add("--seed", type=int, default=0, help="of initial weights and data (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2), help="that make batches")
    add("--save-seconds", type=float, default=60, help="between two savings (default: 60)")
    add("--max-shard-size", default="30MB", help="of a weights file (default: 30MB)")
    add("--no-compile", dest="compile", action="store_false", help="do not compile the layers")
    args = parser.parse_args()
    args.curve = args.curve or args.out.parent / "training_curve.json"
    train(args)


if __name__ == "__main__":
    main()
