r"""What the second stage of `leank mask learn` makes of a mask on a real model, by where it starts.

    PYTHONPATH=benchmarks python -m real.learn_study --model models/qwen-1.5b --steps 400 \
        --second 100 --rates 0.01,0.002 --masks masks --out learn_study.json

Starts are the ranks of channels by what it costs not to have them (`fisher`), and the factors of a
first stage (`learned`). From each, second stages are run at several rates. What is told of each
mask is the loss on held-out samples with far keys as the mask would have them served, before and
after, and the losses of training; of second stages also held-out losses after as many steps as
`leank mask learn` checks its masks. Masks are the last ones, and not the best, as it is learning
that is studied. They are written for `leank verify` and `real.kl`.

With `--pruned zeros` channels that are pruned are 0, as `leank mask learn` has them; with `means`
they are their means, and the start is the mask that `leank mask calibrate --ratio` makes. Samples
are those of `leank mask learn` (`generated`), or prompts of `leank mask calibrate` (`built-in`).
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from baselines.sensitivities import sensitivities
from rich.console import Console

from vllm_leank.bench.results import header, save_results
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.learn.checks import Checks, served_loss
from vllm_leank.learn.data import POOL, Data, Shuffled, Source
from vllm_leank.learn.distillation import Distiller
from vllm_leank.learn.stages import Progress, Recipe, Selection, Stage, run_stage
from vllm_leank.learn.start import ranks
from vllm_leank.mask.checkpoint import DTYPES, Checkpoint
from vllm_leank.mask.file import save_mask
from vllm_leank.mask.statistics import Statistics
from vllm_leank.offline.builtin_prompts import builtin_prompts
from vllm_leank.offline.calibrate_bits import BY_LOSS, measure
from vllm_leank.offline.calibration_prompts import calibration_prompts, longest_prompt
from vllm_leank.offline.fisher import observe_far
from vllm_leank.offline.mask_request import MaskRequest
from vllm_leank.offline.prompts import Sample
from vllm_leank.offline.statistics import StatisticsMeter

BY_SQUARE = "Fisher information of far K * mean square"
"""Channels that learned masks prune are read as 0."""

HELD_OUT = 1_000_000
"""Number of the first held-out sample: training does not get so far."""

CONSOLE = Console(stderr=True, highlight=False)

Scores = npt.NDArray[np.float64]


@dataclass
class Study:
    """The runs, and what is known of them so far."""

    args: argparse.Namespace
    request: MaskRequest
    distiller: Distiller
    source: Source
    held_out: list[Sample]
    means: Statistics | None
    device: torch.device
    results: dict[str, Any] = field(default_factory=lambda: {"masks": []})

    def judge(self, name: str, scores: Scores, **detail: Any) -> None:
        """Tell of the mask of these scores `[L, H, D]`, and write it."""
        mask = self.request.mask(scores, {"method": "learn", "study": name}, self.means)
        loss = served_loss(self.distiller, mask.keep, self.held_out)
        row = {"name": name, "loss": round(loss, 6), **detail}
        self.results["masks"].append(row)
        CONSOLE.print(f"{name}: held-out loss {row['loss']:.4f} as served")
        if self.args.masks:
            self.args.masks.mkdir(parents=True, exist_ok=True)
            file = self.args.masks / f"{name.replace(' ', '_')}.yaml"
            save_mask(mask, file, overwrite=True)

    def train(self, name: str, stage: Stage, factors: torch.Tensor) -> tuple[Progress, Checks]:
        """Run a stage from these factors `[L, H, D]`; one that selects channels is checked, too."""
        progress, checks = Progress.start(factors), Checks()
        begin = time.monotonic()

        def check() -> None:
            if stage.selection is not None and stage.is_checked(progress.step):
                scores = progress.scores()
                keep = stage.selection.keep(scores)
                loss = served_loss(self.distiller, keep, self.held_out)
                checks.add(progress.step, loss, scores)

        def on_step() -> None:
            check()
            if progress.step % 10 == 0:
                last, seconds = np.mean(progress.losses[-10:]), time.monotonic() - begin
                CONSOLE.print(f"{name}: step {progress.step}, loss {last:.4f}, {seconds:.0f} s")

        check()
        run_stage(stage, progress, self.distiller, self.source, on_step=on_step)
        return progress, checks

    def run(self, cost: Scores, write: Callable[[], None]) -> None:
        """Everything, from the cost `[L, H, D]` of channels that are pruned."""
        self.judge("fisher", cost)
        write()
        self._second("fisher", ranks(cost).to(self.device), write)
        ones = torch.ones(cost.shape, device=self.device)
        first, _ = self.train("first stage", Recipe(steps=self.args.steps).first(), ones)
        self.judge("learned", first.scores(), losses=_rounded(first.losses))
        write()
        self._second("learned", first.factors.detach(), write)

    def _second(self, start: str, factors: torch.Tensor, write: Callable[[], None]) -> None:
        """Second stages from these factors `[L, H, D]`."""
        selection = Selection(self.request.ratio, self.request.align)
        for rate in self.args.rates:
            name = f"{start} second {rate:g}"
            stage = Stage(self.args.second, rate, 0.0, selection, self.args.steps)
            progress, checks = self.train(name, stage, factors)
            held_out = [checks.steps, _rounded(checks.losses)]
            self.judge(name, progress.scores(), losses=_rounded(progress.losses), held_out=held_out)
            write()


def _rounded(losses: Sequence[float]) -> list[float]:
    return [round(loss, 6) for loss in losses]


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="directory of the model")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--masks", type=Path, help="folder for the masks")
    parser.add_argument("--ratio", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=400, help="of the first stage")
    parser.add_argument("--second", type=int, default=100, help="steps of each second stage")
    parser.add_argument("--rates", default="0.01,0.002", help="of second stages, with commas")
    parser.add_argument("--pruned", default="zeros", choices=("zeros", "means"))
    parser.add_argument("--samples", default="generated", choices=("generated", "built-in"))
    parser.add_argument("--min-tokens", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--held-out", type=int, default=16, help="samples to judge by")
    parser.add_argument("--prompts", type=int, help="to calibrate on; by default as `leank`")
    parser.add_argument("--calibrate-on", type=int, help="tokens of the longest; the same")
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--device", help="cpu or cuda; by default the GPU")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="of the code measured; asked of git when not given")
    args = parser.parse_args()
    try:
        study(args)
    except (UserError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def samples(
    checkpoint: Checkpoint, window: Window, args: argparse.Namespace
) -> tuple[Source, list[Sample]]:
    """Samples to train on, and others to judge by."""
    lengths = {"min_tokens": args.min_tokens, "max_tokens": args.max_tokens}
    if args.samples == "generated":
        source, _, _ = Data(**lengths, generated=True).open(checkpoint, window, args.seed)
        return source, [source(HELD_OUT + i) for i in range(args.held_out)]
    named = builtin_prompts(checkpoint, POOL, **lengths, seed=args.seed)
    others = builtin_prompts(checkpoint, args.held_out, **lengths, seed=args.seed, held_out=True)
    return Shuffled([one for _, one in named], args.seed), [one for _, one in others]


def study(args: argparse.Namespace) -> None:
    """The study that the options ask for.

    Raises:
        UserError: the model or an option cannot be used.
    """
    args.rates = [float(rate) for rate in args.rates.split(",")]
    request = MaskRequest.open(
        args.model, None, ratio=args.ratio, align=32, sink=args.sink, recent=args.recent
    )
    checkpoint, window = request.checkpoint, request.window
    source, held_out = samples(checkpoint, window, args)
    device = checkpoint.place(args.device, args.dtype)
    model = checkpoint.load(args.dtype, device)
    longest = longest_prompt(checkpoint, args.calibrate_on, device)
    prompts = calibration_prompts(
        checkpoint, None, window, max_tokens=longest, count=args.prompts, seed=args.seed
    )
    means = k_mean = None
    if args.pruned == "means":
        measured = measure(model, prompts, window, args.seed)
        score, cost, means = BY_LOSS, measured.k_losses[0], measured.statistics.for_mask()
        k_mean = torch.tensor(means.k_mean, dtype=torch.float32, device=model.device)
    else:
        meter = StatisticsMeter(checkpoint.geometry, rotation=None)
        observe_far(model, prompts.ids, window, meter)
        gradients = sensitivities(model, prompts.ids, window, seed=args.seed)
        score, cost = BY_SQUARE, gradients.key * meter.statistics().k_square
    distiller = Distiller(model, window, means=k_mean)
    found = Study(args, request, distiller, source, held_out, means, model.device)
    found.results |= {
        **header(
            "held-out distillation loss of masks as served, by how they were found",
            args.commit,
            "python -m real.learn_study",
        ),
        "model": checkpoint.id,
        "dtype": str(model.dtype).removeprefix("torch."),
        "window": {"sink": window.sink, "recent": window.recent},
        "fisher": {"score": score, **prompts.provenance},
        "pruned": args.pruned,
        "samples": args.samples,
    }
    found.run(cost, lambda: save_results(found.results, args.out))


if __name__ == "__main__":
    main()
