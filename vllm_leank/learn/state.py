"""The file from which an interrupted run goes on: safetensors, replaced in one step."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from vllm_leank.core.atomic import write_atomically
from vllm_leank.errors import UserError
from vllm_leank.learn.stages import Progress

FORMAT = "leank-learn/1"

Settings = dict[str, Any]


@dataclass
class State:
    """Both stages of a run and, as plain values, the settings that they depend on.

    Stage 1 does not depend on the ratio, so a run with another ratio goes on from its end.
    """

    first_settings: Settings
    second_settings: Settings
    first: Progress
    second: Progress | None = None

    def save(self, path: Path) -> None:
        """Write the file.

        Raises:
            UserError: it cannot be written.
        """
        settings = {"first": self.first_settings, "second": self.second_settings}
        tensors = _tensors("first", self.first)
        if self.second is not None:
            tensors |= _tensors("second", self.second)
        metadata = {"format": FORMAT, "settings": json.dumps(settings)}
        try:
            write_atomically(path, safetensors.torch.save(tensors, metadata))
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error

    @classmethod
    def resume(
        cls,
        path: Path,
        first_settings: Settings,
        second_settings: Settings,
        shape: tuple[int, int, int],
        device: str,
    ) -> "State":
        """The state in a file, or a fresh one where there is no file; factors are `[L, H, D]`.

        Raises:
            UserError: the file is no such state, or stage 1 had other settings.
        """
        fresh = cls(
            first_settings, second_settings, Progress.start(torch.ones(shape, device=device))
        )
        if not path.exists():
            return fresh
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if metadata.get("format") != FORMAT:
            raise UserError(f"{path}: not the state of a run of `leank mask learn`")
        settings = json.loads(metadata["settings"])
        for name, value in first_settings.items():
            if (found := settings["first"].get(name)) != value:
                raise UserError(
                    f"{path}: is of a run with {name} {found}, not {value}; remove it to start "
                    "anew, or name another file with --state"
                )
        fresh.first = _progress("first", tensors)
        if "second.factors" in tensors and settings["second"] == second_settings:
            fresh.second = _progress("second", tensors)
        return fresh


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
