"""A whole run: from a checkpoint and data to a mask, with a state to go on from."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_leank.errors import UserError, printable
from vllm_leank.learn.checks import PATIENCE, Checks
from vllm_leank.learn.data import Data
from vllm_leank.learn.display import Display
from vllm_leank.learn.distillation import Distiller
from vllm_leank.learn.fingerprint import fingerprint
from vllm_leank.learn.signals import stop_on_signals
from vllm_leank.learn.stage_runner import StageRunner
from vllm_leank.learn.stages import Progress, Recipe, Refinement, Selection
from vllm_leank.learn.start import by_fisher, by_mask, fitting_mask
from vllm_leank.learn.state import State
from vllm_leank.learn.workers import Workers
from vllm_leank.mask.checkpoint import ALL_GPUS, usable_device
from vllm_leank.mask.mask import Mask
from vllm_leank.offline.mask_request import MaskRequest

FISHER, NOTHING = "fisher", "nothing"
"""Starts that are no mask's file."""


@dataclass(frozen=True)
class Learned:
    """A mask, the factors `[L, H, D]` it was made from, the losses of both stages' steps, how masks
    of stage 2 were judged, and a sentence on what came of it.
    """

    mask: Mask
    factors: npt.NDArray[np.float64]
    losses: tuple[list[float], list[float]]
    checks: Checks
    outcome: str


def learn(
    request: MaskRequest,
    data: Data,
    state_path: Path,
    *,
    recipe: Recipe | Refinement | None = None,
    start: Path | None = None,
    seed: int = 0,
    chunk: int = 4096,
    dtype: str = "auto",
    device: str | None = None,
    save_steps: int = 25,
    patience: int = PATIENCE,
) -> Learned | None:
    """Learn the mask that is asked for: by a `Refinement` of the mask in the file `start`, or of
    one that is calibrated first (None), or by LeanK's `Recipe` from nothing.

    The mask is the best of those that stage 2 was seen to have, the one that it starts from
    included, by their losses on held-out samples (`Checks`). It ends where `patience` checks in a
    row find none better.

    `state_path` is written every `save_steps` steps and at the end; where it exists, the run goes
    on from it. Prompts are computed `chunk` tokens at a time. With several processes (`Workers`)
    each step averages the gradients of one sample each, and only the first one gets the result;
    the others get None.

    Raises:
        UserError: the model, the data, the start or the state cannot be used, a value is out of
            range, or the run was interrupted.
    """
    recipe = recipe or Refinement()
    if chunk < 1:
        raise UserError(f"chunk is {chunk}; it must be at least 1 token")
    if patience < 1:
        raise UserError(f"patience is {patience}; it must be at least 1 check")
    checkpoint = request.checkpoint
    given = None if start is None else fitting_mask(start, request)
    source, held_out, description = data.open(checkpoint, request.window, seed)
    device = usable_device(device)
    if device == ALL_GPUS:
        raise UserError(f"device is {device}; learning takes one GPU for each process")
    workers, device = Workers.join(device)
    try:
        model = checkpoint.load(dtype, device)
        weights = str(model.dtype).removeprefix("torch.")
        geometry = checkpoint.geometry
        settings: dict[str, Any] = {
            "model": checkpoint.id,
            "model_sha256": fingerprint(model),
            "geometry": geometry.as_dict(),
            "sink": request.window.sink,
            "recent": request.window.recent,
            **_start_settings(recipe, given),
            **description,
            **asdict(recipe),
            "samples_per_step": workers.count,
            "seed": seed,
            "dtype": weights,
        }
        second_settings = {"ratio": float(request.ratio), "align": request.align}
        state = State.resume(state_path, settings, second_settings, device)
        if state is None:
            ones = torch.ones(geometry.shape, device=device)
            state = State(settings, second_settings, Progress.start(ones))
            if isinstance(recipe, Refinement):
                begin = by_mask(given) if given else by_fisher(model, request, data.file, seed)
                # Every process calibrates; what they find may differ in rounding.
                state.first = Progress.start(workers.same(begin.factors.to(device)))
                state.statistics, state.told = begin.statistics, begin.told
        means = None
        if state.statistics is not None:
            k_mean = torch.tensor(state.statistics.k_mean, dtype=torch.float32, device=device)
            means = workers.same(k_mean)
        selection = Selection(request.ratio, request.align)
        distiller = Distiller(model, request.window, chunk, means)
        with stop_on_signals() as stop, Display(workers.is_first) as display:
            runner = StageRunner(
                distiller, source, held_out, state, state_path, save_steps, workers, stop, display
            )
            if isinstance(recipe, Recipe):
                runner.stage("stage 1", recipe.first(), state.first)
                display.note(_advice(state.first, request.ratio))
            state.second = state.second or Progress.start(state.first.factors)
            runner.judged_stage(recipe.second(selection, workers.count), state.second, patience)
        if not workers.is_first:
            return None
    finally:
        workers.leave()
    outside = ("model", "geometry", "sink", "recent")
    provenance: dict[str, Any] = {"method": "learn"}
    provenance |= {name: value for name, value in settings.items() if name not in outside}
    provenance |= state.told
    if state.first.step:
        provenance["first_stage_loss"] = _last_loss(state.first)
    provenance["second_stage_loss"] = _last_loss(state.second)
    checks, scores = state.checks, state.checks.best
    assert scores is not None
    provenance |= checks.told()
    losses = (state.first.losses, state.second.losses)
    mask = request.mask(scores, provenance, state.statistics)
    outcome = checks.outcome(_start_called(settings["start"]))
    return Learned(mask, scores.clip(0, 1), losses, checks, outcome)


def _start_settings(recipe: Recipe | Refinement, given: Mask | None) -> dict[str, str]:
    """What tells one start from another."""
    if given is not None:
        assert given.path is not None
        return {"start": printable(given.path.name), "start_sha256": given.sha256}
    return {"start": NOTHING if isinstance(recipe, Recipe) else FISHER}


def _start_called(start: str) -> str:
    """What the mask is called that stage 2 starts from."""
    return {FISHER: "the calibrated one", NOTHING: "that of stage 1"}.get(start, f"that of {start}")


def _advice(first: Progress, ratio: float) -> str | None:
    """What to say where stage 1 gave up more channels than are to be pruned."""
    alive = float((first.factors > 0).float().mean())
    if alive >= 1 - ratio:
        return None
    return (
        f"note: stage 1 left {alive:.1%} of the factors above 0, but the mask keeps "
        f"{1 - ratio:.1%}: the rest is chosen among channels that it gave up; consider a larger "
        "--ratio or a smaller --reg"
    )


def _last_loss(progress: Progress) -> float:
    """Mean over the last tenth of the steps."""
    last = progress.losses[-max(1, progress.step // 10) :]
    return round(sum(last) / len(last), 6)
