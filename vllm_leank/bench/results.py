"""Result files: JSON that says what was measured, on what, with what, and by which command."""

import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from vllm_leank.bench.machine import head_commit, machine
from vllm_leank.core.atomic import write_atomically
from vllm_leank.errors import UserError
from vllm_leank.mask.mask import Mask
from vllm_leank.version import __version__

ATTENTION = "decode attention"
SERVE = "engines under load"


class CorrectnessError(UserError):
    """What was to be measured gives wrong results, so there is nothing to report."""


def header(what: str, commit: str | None = None, program: str = "leank") -> dict[str, Any]:
    """The first entries of every result file; `commit` is asked of git when it is not given, and
    `program` is what was called, with this process's arguments.
    """
    return {
        "what": what,
        "command": shlex.join([*program.split(), *sys.argv[1:]]),
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


def save_results(results: dict[str, Any], path: Path) -> None:
    """Write a result file in one step.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_atomically(path, (json.dumps(results, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def load_results(path: Path, kind: str) -> dict[str, Any]:
    """Read a result file of `leank bench` whose `what` is `kind`.

    Raises:
        UserError: it cannot be read, or is no such file.
    """
    try:
        results = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(results, dict) or results.get("what") != kind:
        raise UserError(f"{path}: has no results of the kind {kind!r}")
    return results
