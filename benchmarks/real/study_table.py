"""A table of what `study.py` measured: points, and bytes of a far token.

    PYTHONPATH=benchmarks python -m real.study_table study --out study.json

Points are RULER's, of 100, over the questions that every variant was asked, with 95% intervals;
`lost` are those against dense on the same questions.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from real.answers import scores_of
from real.questions import Cell
from real.served import DENSE
from vllm_leank.bench.results import save_results
from vllm_leank.errors import UserError
from vllm_leank.offline.intervals import Estimate, ratio_estimate

Asked = dict[Cell, int]
"""How many questions of each task and length, of which the first are taken."""


def merged(folder: Path) -> dict[str, Any]:
    """One result of the files in a folder, dense first.

    Raises:
        UserError: there are none, or they are of different models or questions.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise UserError(f"{folder}: no results of real.study")
    for name in ("model", "questions_sha256"):
        if len({one.get(name) for one in found}) > 1:
            raise UserError(f"{folder}: results of more than one {name}")
    found.sort(key=lambda one: (one["variant"] != DENSE, -(one["token_bytes"] or 0)))
    return {
        "what": "points of a real model with several KV caches",
        "model": found[0]["model"],
        "questions_sha256": found[0]["questions_sha256"],
        "variants": [
            {name: value for name, value in one.items() if name not in ("model", "what")}
            for one in found
        ],
    }


def shared_cells(variants: Sequence[dict[str, Any]]) -> Asked:
    """What all were asked: studies take the first questions of each task and length.

    Raises:
        UserError: there are none.
    """
    cells = set.intersection(*(set(scores_of(one)) for one in variants))
    if not cells:
        raise UserError("the variants have no task and length in common")
    return {
        cell: min(len(scores_of(one)[cell]) for one in variants)
        for cell in sorted(cells, key=lambda cell: (cell[1], cell[0]))
    }


def some(cells: Asked, value: str | int) -> Asked:
    """Those of one task or length."""
    return {cell: count for cell, count in cells.items() if value in cell}


def points(variant: dict[str, Any], cells: Asked) -> Estimate:
    """Mean score of all questions, of 100."""
    scores = _scores(variant, cells)
    return ratio_estimate(scores, [1.0] * len(scores))


def mean_points(variant: dict[str, Any], cells: Asked) -> float:
    """The same without an interval, which takes seconds."""
    scores = _scores(variant, cells)
    return sum(scores) / len(scores)


def _scores(variant: dict[str, Any], cells: Asked) -> list[float]:
    found = scores_of(variant)
    return [100 * score for cell, count in cells.items() for score in found[cell][:count]]


def lost(variant: dict[str, Any], dense: dict[str, Any], cells: Asked) -> Estimate:
    """Points that dense has on the same questions and the variant has not."""
    mine, its = scores_of(variant), scores_of(dense)
    gaps = [
        100 * (right - got)
        for cell, count in cells.items()
        for right, got in zip(its[cell][:count], mine[cell][:count], strict=True)
    ]
    return ratio_estimate(gaps, [1.0] * len(gaps))


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    variants = results["variants"]
    cells = shared_cells(variants)
    lengths = sorted({length for _, length in cells})
    table = Table("", "bytes", "x", "points", "lost")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    dense = next((one for one in variants if one["variant"] == DENSE), None)
    for one in variants:
        size, ratio = one["token_bytes"], None
        if size and dense:
            ratio = dense["token_bytes"] / size
        row = [one["variant"], _number(size, ",.0f"), _number(ratio, ".1f")]
        row.append(_with_interval(points(one, cells)))
        row.append("-" if dense in (one, None) else _with_interval(lost(one, dense, cells)))
        for length in lengths:
            row.append(f"{mean_points(one, some(cells, length)):.1f}")
        table.add_row(*row)
    questions = sum(cells.values())
    Console(width=140).print(table, f"{results['model']}: {questions:,} questions each")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _with_interval(one: Estimate) -> str:
    if one.low is None or one.high is None:
        return f"{one.value:.1f}"
    return f"{one.value:.1f} ({one.low:.1f} to {one.high:.1f})"


def main() -> None:
    """Show and save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what real.study wrote")
    parser.add_argument("--out", type=Path, help="one JSON file of all")
    args = parser.parse_args()
    try:
        results = merged(args.folder)
        show(results)
        if args.out:
            save_results(results, args.out)
    except (UserError, ValueError, KeyError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
