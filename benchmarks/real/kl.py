"""What archives do to a real model's answers, beside what other caches do: KL divergence to full
attention, and the bytes of a token.

    PYTHONPATH=benchmarks python -m real.kl --model models/qwen-1.5b --lengths 8192,30000

Masks are made as `leank mask calibrate` makes them, on built-in prompts, and judged on other texts
of these kinds and on kinds of text that calibration does not see. Each prompt is read with full
attention; then its last tokens are given one by one (teacher forcing), once with full attention and
once with K and V as an archive or cache gives them back. Archives round by the code that engines
and their tests use; other caches are simulated. This says nothing of speed. Results are written
after each length.
"""

import argparse
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from baselines.unrounded import Unrounded
from rich.console import Console
from rich.progress import track
from rich.table import Table

from real.caches import Variant, check_groups, load_masks, served_mask
from real.judged_texts import SEEN, UNSEEN, judged_samples
from real.option_numbers import numbers
from real.unseen_texts import unseen_texts
from real.variants import GROUPS, Archives, variants_of
from vllm_leank.bench.results import header, save_results
from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import DTYPES, Checkpoint
from vllm_leank.mask.file import save_mask
from vllm_leank.offline.builtin_prompts import Named
from vllm_leank.offline.calibration_prompts import calibration_prompts, longest_prompt
from vllm_leank.offline.context import Context, logits_after, read_prompt
from vllm_leank.offline.divergence import Divergence, divergence
from vllm_leank.offline.intervals import ratio_estimate
from vllm_leank.offline.simulate import SimulatedArchive

CONSOLE = Console(stderr=True, highlight=False)


@dataclass
class Found:
    """What was found in texts of a kind, a text after the other: sums over its tokens of KL in
    nats and of total variation distance, equal most likely tokens, and how many tokens there were.
    """

    kl: list[float] = field(default_factory=list)
    variation: list[float] = field(default_factory=list)
    agree: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, found: Divergence) -> None:
        """Add a text."""
        self.kl.append(found.total)
        self.variation.append(float(found.variation.sum()))
        self.agree.append(found.agree)
        self.tokens.append(len(found.kl))

    def means(self) -> dict[str, Any]:
        """Per token; with two texts or more, KL has an interval at 95%. By text, in an order alike
        for all caches, it tells two of them apart better than their intervals do.
        """
        tokens = sum(self.tokens)
        kl = ratio_estimate(self.kl, self.tokens)
        interval = {} if kl.low is None else {"low": round(kl.low, 7), "high": round(kl.high, 7)}
        return {
            "kl": round(kl.value, 7),
            **interval,
            "variation": round(sum(self.variation) / tokens, 6),
            "top1": round(sum(self.agree) / tokens, 4),
            "tokens": tokens,
            "texts": len(self.tokens),
            "kl_by_text": [
                round(total / count, 7) for total, count in zip(self.kl, self.tokens, strict=True)
            ],
        }


Judged = dict[str, dict[str, Found]]
"""What was found by variant, and by kind of text or group of kinds."""


@torch.inference_mode()
def judge(
    model: transformers.PreTrainedModel,
    window: Window,
    samples: Sequence[tuple[str, Named]],
    variants: Sequence[Variant],
    broken: set[str] | None = None,
) -> Judged:
    """What each variant does to samples, which come with the groups of their kinds.

    Args:
        model: reads prompts with full attention.
        window: which tokens are far.
        samples: beginnings of texts and what follows them.
        variants: what the latter is read with; their names differ.
        broken: gets the names of variants under which some logits are not finite, and which are
            then left out.

    Raises:
        UserError: without `broken`, there is such a variant.
    """
    context = Context(Geometry.from_hf_config(model.config))
    judged: Judged = {one.name: defaultdict(Found) for one in variants}
    dense = SimulatedArchive(window)
    for group, (kind, sample) in track(samples, "judging", console=CONSOLE):
        read_prompt(model, context, sample.prompt, 4096)
        for one in variants:
            if one.begin is not None:
                one.begin(model, context, sample.prompt)
        expected = logits_after(model, context, sample.answer, dense)
        for one in variants:
            if one.name not in judged:
                continue
            logits = logits_after(model, context, sample.answer, one.hook)
            if broken is not None and not logits.isfinite().all():
                broken.add(one.name)
                del judged[one.name]
                continue
            found = divergence(expected, logits)
            for name in (group, kind):
                judged[one.name][name].add(found)
    return judged


@dataclass
class Study:
    """The command's work, and what it has found so far."""

    args: argparse.Namespace
    results: dict[str, Any] = field(default_factory=dict)

    def run(self, write: Callable[[dict[str, Any]], None]) -> None:
        """Do it all; `write` gets the results after each length.

        Raises:
            UserError: the model or an option cannot be used.
        """
        args, start = self.args, time.monotonic()
        lengths = numbers(args.lengths, int)
        groups = args.variants.split(",")
        check_groups(groups, GROUPS)
        window = Window(args.sink, args.recent)
        checkpoint = Checkpoint.open(args.model)
        masks = load_masks(args.masks, checkpoint)
        if args.keep_masks is not None:
            check_empty(args.keep_masks)
        device = checkpoint.place(args.device, args.dtype)
        texts = unseen_texts(args.texts) if args.unseen else {}
        model = checkpoint.load(args.dtype, device)
        longest = longest_prompt(checkpoint, args.max_tokens, device)
        prompts = calibration_prompts(
            checkpoint, None, window, max_tokens=longest, count=args.prompts, seed=args.seed
        )
        CONSOLE.print(f"calibrating on {prompts}")
        archives = Archives(checkpoint, model, window, prompts, args.seed)
        made = list(variants_of(archives, numbers(args.bits, float), groups))
        if args.keep_masks is not None:
            keep_masks(made, args.keep_masks)
        variants = [served_mask(f"leank {name}", mask, window) for name, mask in masks.items()]
        variants += made
        dense = round(Unrounded().token_bytes(checkpoint.geometry))
        self.results = {
            **header(
                "KL to full attention in nats per token, teacher-forced; caches of others, and "
                "attention, are simulated",
                args.commit,
                "python -m real.kl",
            ),
            "model": checkpoint.id,
            "dtype": str(model.dtype).removeprefix("torch."),
            "window": {"sink": window.sink, "recent": window.recent},
            "calibration": {
                **prompts.provenance,
                "seconds": round(time.monotonic() - start, 1),
            },
            "dense_token_bytes": dense,
            "skipped": [],
            "lengths": [],
            "archives": [
                {
                    "name": one.name,
                    "token_bytes": round(one.token_bytes, 2),
                    "x": round(dense / one.token_bytes, 2),
                    **one.detail,
                    "lengths": {},
                }
                for one in variants
            ],
        }
        for length in lengths:
            samples, left_out = judged_samples(
                checkpoint, texts, length, args.judged, args.unseen, args.seed
            )
            broken: set[str] = set()
            judged = judge(model, window, samples, variants, broken)
            left_out += [
                f"{name}: logits that are not finite with {length:,} tokens, left out"
                for name in sorted(broken)
            ]
            for line in left_out:
                CONSOLE.print(line)
            self.results["skipped"] += left_out
            self.results["lengths"].append(length)
            for row, one in zip(self.results["archives"], variants, strict=True):
                if one.name in judged:
                    row["lengths"][str(length)] = row_of(one, judged[one.name], dense, length)
            self.results["seconds"] = round(time.monotonic() - start, 1)
            write(self.results)


def check_empty(folder: Path) -> None:
    """Make a folder for masks.

    Raises:
        UserError: it has something already, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        raise UserError(f"--keep-masks {folder}: {error.strerror}") from error
    if not empty:
        raise UserError(f"--keep-masks {folder}: has files already; name another folder")


def keep_masks(variants: Sequence[Variant], folder: Path) -> None:
    """Write the masks of variants that are archives of some, by the names of these."""
    for one in variants:
        if one.mask is not None:
            name = re.sub(r"[^\w.]+", "_", one.name.removeprefix("leank "))
            save_mask(one.mask, folder / f"{name}.yaml")


def row_of(variant: Variant, found: dict[str, Found], dense: int, length: int) -> dict[str, Any]:
    """What is told of a variant at one length."""
    exact = min(variant.exact_tokens, length)
    request = exact * dense + (length - exact) * variant.token_bytes
    row: dict[str, Any] = {"x_of_request": round(dense * length / request, 2)}
    row |= {name: one.means() for name, one in found.items()}
    if UNSEEN in found and row[SEEN]["kl"] > 0:
        row["unseen_by_seen"] = round(row[UNSEEN]["kl"] / row[SEEN]["kl"], 2)
    return row


def show(results: dict[str, Any]) -> None:
    """Print the table of KLs."""
    table = Table("", "bytes", "x")
    for length in results["lengths"]:
        table.add_column(f"KL, {length:,} tokens", justify="right")
        table.add_column("other kinds", justify="right")
        table.add_column("ratio", justify="right")
    for row in results["archives"]:
        cells = [row["name"], f"{row['token_bytes']:,.0f}", f"{row['x']:.2f}"]
        for length in results["lengths"]:
            found = row["lengths"].get(str(length), {})
            cells.append(f"{found[SEEN]['kl']:.5f}" if found else "-")
            cells.append(f"{found[UNSEEN]['kl']:.5f}" if UNSEEN in found else "-")
            cells.append(f"{found['unseen_by_seen']:.1f}" if "unseen_by_seen" in found else "-")
        table.add_row(*cells)
    Console(width=140).print(table)


def add_samples(options: argparse.ArgumentParser) -> None:
    """The options of what is read, to calibrate and to judge, and by which model."""
    options.add_argument("--model", required=True, help="directory of the model")
    options.add_argument("--lengths", default="8192", help="of judged prompts, with commas")
    options.add_argument("--prompts", type=int, help="to calibrate on; by default as `leank`")
    options.add_argument("--max-tokens", type=int, help="the longest; by default as `leank`")
    options.add_argument("--judged", type=int, default=8, help="samples of kinds seen, per length")
    options.add_argument("--unseen", type=int, default=2, help="samples of each kind unseen")
    options.add_argument("--texts", type=Path, help="folder that unseen_texts.py wrote")
    options.add_argument("--sink", type=int, default=64)
    options.add_argument("--recent", type=int, default=256)
    options.add_argument(
        "--device", help="cpu, cuda, cuda:1, or auto: all GPUs; by default the GPU"
    )
    options.add_argument("--dtype", default="auto", choices=DTYPES)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--commit", help="of the code measured; asked of git when not given")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--out", type=Path, help="JSON file of the results")
    options.add_argument("--variants", default=",".join(GROUPS), help="with commas; default: all")
    options.add_argument("--bits", default="4,2,1.5,1", help="of packed, with commas")
    options.add_argument(
        "--masks", type=Path, nargs="*", default=[], help="files of masks to judge as well"
    )
    options.add_argument("--keep-masks", type=Path, help="folder for the masks that this makes")
    add_samples(options)
    return options


def main() -> None:
    """Calibrate, judge, and write the results."""
    args = parser().parse_args()

    def write(results: dict[str, Any]) -> None:
        show(results)
        if args.out:
            save_results(results, args.out)

    try:
        Study(args).run(write)
    except (UserError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
