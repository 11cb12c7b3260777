"""Runs the steps of a stage: shows them, saves them, judges masks, and stops when asked."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_leank.errors import UserError
from vllm_leank.learn.checks import served_loss
from vllm_leank.learn.data import Source
from vllm_leank.learn.display import Display
from vllm_leank.learn.distillation import Distiller
from vllm_leank.learn.signals import Stop
from vllm_leank.learn.stages import Progress, Stage, run_stage
from vllm_leank.learn.state import State
from vllm_leank.learn.workers import Workers
from vllm_leank.offline.progress import about
from vllm_leank.offline.prompts import Sample


@dataclass
class StageRunner:
    """What both stages are run with; `state` is written to `path` every `save_steps` steps."""

    distiller: Distiller
    source: Source
    held_out: Sequence[Sample]
    state: State
    path: Path
    save_steps: int
    workers: Workers
    stop: Stop
    display: Display

    def stage(self, name: str, stage: Stage, progress: Progress) -> None:
        """Run what is left of a stage."""
        self.display.begin(name, stage.steps, progress)
        self._run(name, stage, progress, lambda: False)

    def judged_stage(self, stage: Stage, progress: Progress, patience: int) -> None:
        """Run what is left of stage 2, or what `patience` leaves of it."""
        name, checks = "stage 2", self.state.checks
        self.display.begin(name, stage.steps, progress)
        if not checks.losses:
            begin = time.monotonic()
            self._check(stage, progress)
            self.display.note(self._estimate(stage, time.monotonic() - begin))

        def is_over() -> bool:
            if stage.is_checked(progress.step):
                self._check(stage, progress)
            return checks.without_gain >= patience

        if checks.without_gain < patience:
            self._run(name, stage, progress, is_over)
        if progress.step < stage.steps:
            self.display.note(
                f"{name}: ended early, after step {progress.step} of {stage.steps}, as nothing was "
                f"gained on held-out samples at {checks.without_gain} checks in a row"
            )

    def _check(self, stage: Stage, progress: Progress) -> None:
        """Judge the mask of the current factors."""
        assert stage.selection is not None
        scores, checks = progress.scores(), self.state.checks
        try:
            keep = stage.selection.keep(scores)
            loss = served_loss(self.distiller, keep, self.held_out, self.workers)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory("a check of held-out samples", error) from error
        checks.add(progress.step, loss, scores)
        self.display.check(checks)

    def _estimate(self, stage: Stage, seconds: float) -> str:
        """How long a stage will take, told after its first check. A step takes hardly longer than a
        check takes for a sample: both are mostly the reading of its prompt.
        """
        count = len(self.held_out)
        each = seconds / len(self.held_out[:: self.workers.count])
        later = len(stage.checked_steps)  # but the first, and the last step's
        return (
            f"stage 2: {stage.steps} steps and {later} more checks of {count} held-out samples: "
            f"{about(each * stage.steps + seconds * later)} at most"
        )

    def _run(
        self, name: str, stage: Stage, progress: Progress, is_over: Callable[[], bool]
    ) -> None:
        """Run steps until a stage's last one, or until it `is_over`, which is asked after each."""

        def on_step() -> bool:
            self.display.step(progress)
            over = is_over()
            stopped = self.workers.any(self.stop.asked, progress.factors.device)
            due = over or progress.step == stage.steps or progress.step % self.save_steps == 0
            if self.workers.is_first and (stopped or due):
                self.state.save(self.path)
            if stopped:
                raise UserError(
                    f"interrupted after step {progress.step} of {stage.steps} of {name}; "
                    f"the same command goes on from {self.path}"
                )
            return over

        try:
            run_stage(
                stage,
                progress,
                self.distiller,
                self.source,
                workers=self.workers,
                on_step=on_step,
            )
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(f"{name}, step {progress.step + 1}", error) from error


def _out_of_memory(where: str, error: torch.OutOfMemoryError) -> UserError:
    return UserError(
        f"not enough GPU memory in {where}; give a smaller --chunk or --max-tokens ({error})"
    )
