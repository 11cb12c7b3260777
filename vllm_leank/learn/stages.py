"""The two stages of LeanK: factors by distillation, then a mask by straight-through selection.

On real models factors that were learned from nothing are a worse start of stage 2 than the costs of
a calibration (docs/accuracy.md), so `leank mask learn` takes these and runs stage 2 alone.

Stage 1 learns one factor per layer, KV head and K channel, from 1 on, kept in [0, 1]. The loss is
the distillation loss plus `reg` times the mean factor, which pulls down what nothing holds up.

Stage 2 goes on without `reg`. Each step makes the mask of the current factors and runs with it as
when served: channels that the mask keeps are whole, others their means or 0, and heads that keep
none see no far tokens. Gradients pass straight through to all factors, which only say what to keep.
Scaling kept channels by their factors, as LeanK does, learns something that is never served; on
the two real models where that was watched it raised the loss.

Where LeanK takes the quantile `ratio` as its threshold and rounding then moves the share that is
kept, `select_channels` takes the threshold that meets `ratio` after rounding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from vllm_leank.errors import UserError
from vllm_leank.learn.data import Source
from vllm_leank.learn.distillation import Distiller
from vllm_leank.learn.workers import Workers
from vllm_leank.mask.select_channels import select_channels

HINT = 1e-6
"""Weight of gradients in the scores of channels: far below a step of AdamW."""

CHECKS = 6
"""How often a stage's mask is judged after its steps, at most: each costs as much as some steps."""


@dataclass(frozen=True)
class Selection:
    """Share of the channels to prune, and what heads keep multiples of."""

    ratio: float
    align: int

    def keep(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """The mask of the best `scores`, both `[L, H, D]`."""
        return select_channels(scores, self.ratio, self.align)


@dataclass(frozen=True)
class Stage:
    """How one stage is run: stage 1 without a `selection`, stage 2 with one.

    `first_sample` is the number of its first sample.
    """

    steps: int
    lr: float
    reg: float
    selection: Selection | None = None
    first_sample: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: up over the first fifth, down over the last.

        Both ways linear, and never below a tenth of `lr`.
        """
        fifth = max(1.0, self.steps / 5)
        up, down = (step + 1) / fifth, (self.steps - step) / fifth
        return self.lr * min(1.0, max(0.1, up), max(0.1, down))

    @property
    def checked_steps(self) -> range:
        """After how many steps the mask is judged, but for the last ones, after which it is, too:
        equally far apart, the first time before any.
        """
        return range(0, self.steps, math.ceil(self.steps / CHECKS))

    def is_checked(self, step: int) -> bool:
        """Whether the mask is judged after so many steps."""
        return step == self.steps or step in self.checked_steps


@dataclass(frozen=True)
class Refinement:
    """Stage 2 alone, from a mask or costs that are known. At five times this rate the mask of a
    real model became worse than it was.

    Raises:
        UserError: a value is out of range.
    """

    steps: int = 150
    lr: float = 0.002

    def __post_init__(self) -> None:
        _check_schedule(self.steps, self.lr)

    def second(self, selection: Selection, workers: int = 1) -> Stage:
        """Stage 2, on the first samples."""
        return Stage(self.steps, self.lr, 0.0, selection)


@dataclass(frozen=True)
class Recipe:
    """LeanK's schedule, from nothing: stage 2 has a tenth of the steps and half the rate, and no
    `reg`.

    Raises:
        UserError: a value is out of range.
    """

    steps: int = 2000
    lr: float = 0.02
    reg: float = 0.06

    def __post_init__(self) -> None:
        _check_schedule(self.steps, self.lr)
        if not 0 <= self.reg < float("inf"):
            raise UserError(f"reg is {self.reg}; it must be 0 or more")

    def first(self) -> Stage:
        """Stage 1."""
        return Stage(self.steps, self.lr, self.reg)

    def second(self, selection: Selection, workers: int = 1) -> Stage:
        """Stage 2, on samples after those that `workers` processes saw in stage 1."""
        steps = max(1, self.steps // 10)
        return Stage(steps, self.lr / 2, 0.0, selection, self.steps * workers)


def _check_schedule(steps: int, lr: float) -> None:
    if steps < 1:
        raise UserError(f"steps is {steps}; it must be at least 1")
    if not 0 < lr <= 1:
        raise UserError(f"lr is {lr}; it must lie above 0 and be at most 1")


@dataclass
class Progress:
    """Where a stage stands: `factors` fp32 `[L, H, D]`, AdamW's moments, and what was seen.

    `losses` has the distillation loss of each step so far, `means` the mean factor after it.
    """

    factors: torch.Tensor
    first_moment: torch.Tensor
    second_moment: torch.Tensor
    losses: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, factors: torch.Tensor) -> "Progress":
        """A stage that begins with these factors."""
        return cls(factors.clone(), torch.zeros_like(factors), torch.zeros_like(factors))

    def scores(self) -> npt.NDArray[np.float64]:
        """What channels are chosen by: the factors `[L, H, D]`, with a hint where they are equal.

        Many end at exactly 0 or 1. Such are ranked by AdamW's first moment, the mean gradient of
        late: first comes what should grow most.
        """
        moment = self.first_moment.double()
        scale = moment.abs().max().clamp(min=1e-300)
        return (self.factors.detach().double() - HINT * moment / scale).cpu().numpy()

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.losses)


def run_stage(
    stage: Stage,
    progress: Progress,
    distiller: Distiller,
    source: Source,
    *,
    workers: Workers | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> None:
    """Take `progress` to the stage's last step; `on_step` is called after each, and ends the stage
    when it says something true.

    Raises:
        UserError: a loss is not finite, or the model or a sample cannot be used.
    """
    workers = workers or Workers()
    factors = progress.factors.requires_grad_(True)
    optimizer = torch.optim.AdamW([factors], lr=stage.lr, weight_decay=0.0)
    optimizer.state[factors] = {
        "step": torch.tensor(float(progress.step)),
        "exp_avg": progress.first_moment,
        "exp_avg_sq": progress.second_moment,
    }
    while progress.step < stage.steps:
        number = stage.first_sample + progress.step * workers.count + workers.rank
        keep = None if stage.selection is None else stage.selection.keep(progress.scores())
        used, blind = _used(factors, keep)
        loss = distiller.loss(source(number), used, blind)
        (loss + stage.reg * factors.mean()).backward()
        assert factors.grad is not None
        distance = float(workers.mean(loss.detach()))
        workers.mean(factors.grad)
        if not (np.isfinite(distance) and bool(factors.grad.isfinite().all())):
            raise UserError(
                f"the loss of step {progress.step + 1} is not finite; try another dtype, or a "
                "lower learning rate"
            )
        optimizer.param_groups[0]["lr"] = stage.rate(progress.step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            factors.clamp_(0, 1)
        progress.losses.append(distance)
        progress.means.append(float(factors.detach().mean()))
        if on_step():
            break
    factors.requires_grad_(False)


def _used(
    factors: torch.Tensor, mask: npt.NDArray[np.bool_] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What scales far keys `[L, H, D]`, and the heads that see none of them, bool `[L, H]`."""
    if mask is None:
        return factors, None
    keep = torch.from_numpy(mask).to(factors.device)
    # Forward: the mask. Backward: the identity, for all factors.
    return (keep.float() - factors).detach() + factors, ~keep.any(-1)
