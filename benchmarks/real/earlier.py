"""Results of a run that was stopped, to which another adds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_leank.errors import UserError


def earlier_results(path: Path, fresh: dict[str, Any], same: Sequence[str]) -> dict[str, Any]:
    """What an earlier run has left in a file, or `fresh`, the results of one that has not begun.

    Args:
        path: the file, which need not be there.
        fresh: says under `what` which study it is.
        same: names of entries that must not have changed.

    Raises:
        UserError: the file is of another study or run.
    """
    if not path.exists():
        return fresh
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no results of this study: {error}") from error
    if not isinstance(found, dict) or found.get("what") != fresh["what"]:
        raise UserError(f"{path}: no results of this study")
    check_same(path, found, fresh, same)
    return found


def check_same(
    path: Path, found: dict[str, Any], fresh: dict[str, Any], same: Sequence[str]
) -> None:
    """Refuse results of another run than that of `fresh`.

    Raises:
        UserError: an entry of `same` differs.
    """
    if changed := [name for name in same if found.get(name) != fresh[name]]:
        raise UserError(f"{path}: made with another {', '.join(changed)}; move it away")
