"""Result files: JSON that says what was measured, on what, with what, and by which command."""

import datetime
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from vllm_leank.bench.machine import head_commit, machine
from vllm_leank.errors import UserError
from vllm_leank.mask import Mask
from vllm_leank.version import __version__


class CorrectnessError(UserError):
    """What was to be measured gives wrong results, so there is nothing to report."""


def header(commit: str | None = None) -> dict[str, Any]:
    """The first entries of every result file; `commit` is asked of git when it is not given."""
    return {
        "command": shlex.join(["leank", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "vllm_leank": __version__,
        "commit": commit or head_commit(),
        "machine": machine(),
    }


def describe_mask(mask: Mask) -> dict[str, Any]:
    """What identifies a mask, and what it keeps."""
    return {
        "model": mask.model,
        "sha256": mask.sha256,
        "method": mask.provenance["method"],
        "k_kept": round(mask.k_kept, 6),
        "v_kept": round(mask.v_kept, 6),
    }


def check_new(path: Path | None, overwrite: bool) -> None:
    """Refuse a place that results cannot be written to before hours of work, not after them.

    Raises:
        UserError: the file exists and must not be replaced, or its folder does not exist.
    """
    if path is None:
        return
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; choose another name or give --overwrite")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such directory")


def save_results(results: dict[str, Any], path: Path) -> None:
    """Write a result file in one step.

    Raises:
        UserError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
