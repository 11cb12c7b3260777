"""The file from which an interrupted run goes on: safetensors, replaced in one step."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from vllm_leank.core.atomic import write_atomically
from vllm_leank.errors import UserError
from vllm_leank.learn.checks import Checks
from vllm_leank.learn.stages import Progress
from vllm_leank.mask.statistics import STATISTICS, Statistics

FORMAT = "leank-learn/2"

Settings = dict[str, Any]


@dataclass
class State:
    """Both stages of a run and, as plain values, the settings that they depend on.

    Stage 1 does not depend on the ratio, so a run with another ratio goes on from its end. Of runs
    without a stage 1 `first` has the factors that they start from and no steps; `statistics` and
    `told` are the start's. `checks` are stage 2's.
    """

    first_settings: Settings
    second_settings: Settings
    first: Progress
    second: Progress | None = None
    checks: Checks = field(default_factory=Checks)
    statistics: Statistics | None = None
    told: Settings = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the file.

        Raises:
            UserError: it cannot be written.
        """
        settings = {
            "first": self.first_settings,
            "second": self.second_settings,
            "start": self.told,
        }
        tensors = _tensors("first", self.first)
        if self.second is not None:
            tensors |= _tensors("second", self.second)
        if self.checks.best is not None:
            tensors |= {
                "checks.steps": torch.tensor(self.checks.steps),
                "checks.losses": torch.tensor(self.checks.losses, dtype=torch.float64),
                "checks.best": torch.from_numpy(self.checks.best),
            }
        if self.statistics is not None:
            for name in STATISTICS:
                tensors[f"start.{name}"] = torch.tensor(getattr(self.statistics, name))
        metadata = {"format": FORMAT, "settings": json.dumps(settings)}
        try:
            write_atomically(path, safetensors.torch.save(tensors, metadata))
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error

    @classmethod
    def resume(
        cls, path: Path, first_settings: Settings, second_settings: Settings, device: str
    ) -> "State | None":
        """The state in a file, None where there is no file.

        Raises:
            UserError: the file is no such state, or what it starts from had other settings.
        """
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path}: not the state of a run of `leank mask learn`")
        settings = _settings(path, metadata)
        for name, value in first_settings.items():
            if (found := settings["first"].get(name)) != value:
                raise UserError(
                    f"{path}: is of a run with {name} {found}, not {value}; remove it to start "
                    "anew, or name another file with --state"
                )
        second, checks = None, Checks()
        try:
            if "second.factors" in tensors and settings["second"] == second_settings:
                second, checks = _progress("second", tensors), _checks(tensors)
            return cls(
                first_settings,
                second_settings,
                _progress("first", tensors),
                second,
                checks,
                _statistics(tensors),
                settings["start"],
            )
        except KeyError as error:
            raise _lacks(path, f"the tensor {error}") from error


def _settings(path: Path, metadata: dict[str, str]) -> dict[str, Settings]:
    """What a file's metadata says of both stages and their start.

    Raises:
        UserError: it says nothing, or no such thing.
    """
    try:
        read = json.loads(metadata.get("settings", "null"))
    except ValueError:
        read = None
    settings: dict[str, Any] = {"start": {}} | (read if isinstance(read, dict) else {})
    for name in ("first", "second", "start"):
        if not isinstance(settings.get(name), dict):
            raise _lacks(path, f"the settings of {name!r}")
    return settings


def _lacks(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: lacks {what}, so it is no whole state of a run; remove it to start anew, or name "
        "another file with --state"
    )


def _tensors(stage: str, progress: Progress) -> dict[str, torch.Tensor]:
    return {
        f"{stage}.factors": progress.factors.detach(),
        f"{stage}.first_moment": progress.first_moment,
        f"{stage}.second_moment": progress.second_moment,
        f"{stage}.losses": torch.tensor(progress.losses, dtype=torch.float64),
        f"{stage}.means": torch.tensor(progress.means, dtype=torch.float64),
    }


def _progress(stage: str, tensors: dict[str, torch.Tensor]) -> Progress:
    get = lambda name: tensors[f"{stage}.{name}"]  # noqa: E731
    return Progress(
        get("factors"),
        get("first_moment"),
        get("second_moment"),
        get("losses").tolist(),
        get("means").tolist(),
    )


def _checks(tensors: dict[str, torch.Tensor]) -> Checks:
    steps, losses, best = (tensors[f"checks.{name}"].cpu() for name in ("steps", "losses", "best"))
    return Checks(steps.tolist(), losses.tolist(), best.numpy())


def _statistics(tensors: dict[str, torch.Tensor]) -> Statistics | None:
    if "start.k_mean" not in tensors:
        return None
    arrays: list[np.ndarray] = [tensors[f"start.{name}"].cpu().numpy() for name in STATISTICS]
    return Statistics(*arrays)
