"""Judges masks on samples that no step learns from, so that a run hands out the best it saw.

Losses of training say little of a mask: each is of another sample, and may fall while the mask gets
worse. So the mask of the current factors is looked at a few times, as it would be served, always on
the same samples, and for the first time before the first step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from vllm_leank.errors import UserError
from vllm_leank.learn.distillation import Distiller
from vllm_leank.learn.workers import Workers
from vllm_leank.offline.prompts import Sample

PATIENCE = 3
"""Checks in a row without a gain, after which a run ends."""


@dataclass
class Checks:
    """What was found so far, in the order of steps.

    Attributes:
        steps: how many steps were done at each check; 0 at the first.
        losses: on held-out samples, a mean.
        best: scores `[L, H, D]` that made the mask with the lowest loss, the first of equal ones.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best: npt.NDArray[np.float64] | None = None

    def add(self, step: int, loss: float, scores: npt.NDArray[np.float64]) -> None:
        """Note the loss of the mask of these `scores`."""
        if not self.losses or loss < min(self.losses):
            self.best = scores.copy()
        self.steps.append(step)
        self.losses.append(loss)

    @property
    def best_index(self) -> int:
        """Which check was the best."""
        return self.losses.index(min(self.losses))

    @property
    def without_gain(self) -> int:
        """Checks since the best one."""
        return len(self.losses) - 1 - self.best_index if self.losses else 0

    def told(self) -> dict[str, float]:
        """What a mask's provenance says of this."""
        return {
            "held_out_loss": round(self.losses[self.best_index], 6),
            "held_out_loss_before": round(self.losses[0], 6),
            "kept_step": self.steps[self.best_index],
            "last_step": self.steps[-1],
        }

    def outcome(self, start: str) -> str:
        """What came of it, a sentence; `start` is what the mask of the first check is called."""
        best, before = self.best_index, self.losses[0]
        if best:
            last = ""
            if self.without_gain:
                last = f"; step {self.steps[-1]}, the last, had {self.losses[-1]:.4g}"
            return (
                f"kept the mask after step {self.steps[best]}: loss on held-out samples "
                f"{self.losses[best]:.4g}, {before:.4g} before learning{last}"
            )
        later = self.losses[1:]
        found = f"at best {min(later):.4g} after step {self.steps[1 + later.index(min(later))]}"
        return (
            f"learning did not help: loss on held-out samples {before:.4g} before it, {found}; the "
            f"mask is {start}"
        )


@torch.no_grad()
def served_loss(
    distiller: Distiller,
    keep: npt.NDArray[np.bool_],
    samples: Sequence[Sample],
    workers: Workers | None = None,
) -> float:
    """Mean distillation loss of a mask, `keep` `[L, H, D]`, as it is served. Each of the `workers`
    reads a part of the samples, and all get the same result.

    Raises:
        UserError: it is not finite, or a sample cannot be used.
    """
    workers = workers or Workers()
    whole = torch.tensor(keep).to(distiller.model.device)
    losses = [
        float(distiller.loss(sample, whole.float(), ~whole.any(-1)))
        for sample in samples[workers.rank :: workers.count]
    ]
    total = torch.tensor(sum(losses), dtype=torch.float64, device=whole.device)
    mean = float(workers.mean(total)) * workers.count / len(samples)
    if not np.isfinite(mean):
        raise UserError("the loss on held-out samples is not finite; try another dtype")
    return mean
