"""The table of what `selection_study.py` measured."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from real.judged_texts import SEEN, UNSEEN
from vllm_leank.offline.intervals import Estimate, ratio_estimate

Cells = Sequence[dict[str, Any]]


def rows_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each row: by length, KL per token and its 95% interval over texts, by group of kinds, the
    share of equal most likely tokens, of attention found and the weights lost; and points of 100 of
    all questions and by length.
    """
    texts, answers = results["texts"], results["answers"]
    names = list((texts or answers)[0]["rows"])
    return {
        name: {
            "lengths": {
                str(length): _of_texts(name, [one for one in texts if one["length"] == length])
                for length in _lengths(texts)
            },
            "points": _points(name, answers),
        }
        for name in names
    }


def _lengths(cells: Cells) -> list[int]:
    return sorted({one["length"] for one in cells})


def _of_texts(name: str, texts: Cells) -> dict[str, Any]:
    tokens = sum(one["tokens"] for one in texts)
    rows = [one["rows"][name] for one in texts]
    found: dict[str, Any] = {
        "texts": len(texts),
        "top1": round(sum(row["agree"] for row in rows) / tokens, 4),
        "found": round(sum(row["found"] for row in rows) / len(rows), 4),
        "lost": round(sum(row["lost"] for row in rows) / len(rows), 5),
    }
    for group in (SEEN, UNSEEN):
        own = [one for one in texts if one["group"] == group]
        if own:
            sums = [one["rows"][name]["kl"] for one in own]
            found[group] = _rounded(ratio_estimate(sums, [one["tokens"] for one in own]), 6)
    return found


def _points(name: str, answers: Cells) -> dict[str, Any]:
    if not answers:
        return {}
    groups = {"all": answers} | {
        str(length): [one for one in answers if one["length"] == length]
        for length in _lengths(answers)
    }
    return {
        group: {"questions": len(own)}
        | _rounded(ratio_estimate([100 * one["rows"][name] for one in own], [1.0] * len(own)), 2)
        for group, own in groups.items()
    }


def _rounded(estimate: Estimate, digits: int) -> dict[str, float | None]:
    return {
        name: value if value is None else round(value, digits)
        for name, value in asdict(estimate).items()
    }


def show(results: dict[str, Any]) -> None:
    """Print it."""
    rows = results["rows"]
    lengths, asked = _lengths(results["texts"]), _lengths(results["answers"])
    table = Table("")
    for length in lengths:
        table.add_column(f"{length:,} tokens: KL", justify="right")
        table.add_column("other kinds", justify="right")
        table.add_column("found", justify="right")
    for length in ["all", *map(str, asked)] if asked else []:
        table.add_column(f"points, {length}", justify="right")
    for name, row in rows.items():
        cells = [name]
        for found in row["lengths"].values():
            cells += [
                f"{found[one]['value']:.5f}" if one in found else "-" for one in (SEEN, UNSEEN)
            ]
            cells.append(f"{found['found']:.1%}")
        cells += [f"{one['value']:.1f}" for one in row["points"].values()]
        table.add_row(*cells)
    Console(width=140).print(table, f"{results['model']}: {len(results['texts'])} texts, "
        f"{len(results['answers'])} questions")  # fmt: skip
