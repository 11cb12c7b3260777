"""RULER's scores, from the files that lm_eval writes."""

import json
from collections.abc import Sequence
from pathlib import Path

from vllm_leank.errors import UserError

Scores = dict[str, dict[int, float]]
"""By task and length, 0..1."""


def read_scores(folder: Path, length: int) -> dict[str, float]:
    """Each task's score at `length`, from the newest results below a folder.

    lm_eval gives -1 for lengths that were not asked; they are left out.

    Raises:
        UserError: there are no results, or they have no score of that length.
    """
    files = sorted(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"{folder}: lm_eval wrote no results")
    results = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
    scores = {
        task: float(values[f"{length},none"])
        for task, values in results.items()
        if values.get(f"{length},none", -1) != -1
    }
    if not scores:
        raise UserError(f"{files[-1]}: has no score of {length} tokens")
    return scores


def join_scores(parts: Sequence[tuple[int, dict[str, float]]]) -> Scores:
    """Scores of several lengths, by task."""
    joined: Scores = {}
    for length, scores in parts:
        for task, score in scores.items():
            joined.setdefault(task, {})[length] = score
    return joined
