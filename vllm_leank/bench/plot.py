"""Draws the speed-up of decode attention against context length and batch."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_leank.bench.results import ATTENTION, load_results
from vllm_leank.core.formats import NATIVE
from vllm_leank.errors import UserError, shortened
from vllm_leank.mask.pictures import check_picture, save_figure

AXES = {"length": "context length, tokens", "batch": "batch, requests"}
SERIES = ("model", "archive_format", "length", "batch", "sink", "recent")
"""What tells cases apart, in the order of labels."""


def plot_speedup(paths: Sequence[Path], out: Path) -> None:
    """Draw the cases of result files: a panel over context length, and one over the batch.

    Points on full lines are measured, dashes are the bound by bytes.

    Raises:
        UserError: a file is no result of `leank bench attention`, or the picture cannot be made.
    """
    check_picture(out)
    cases = [case for path in paths for case in read_cases(path)]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    for axes, over in zip(figure.subplots(1, 2, sharey=True), AXES, strict=True):
        for color, (label, rows) in enumerate(series(cases, over).items()):
            xs = [row[over] for row in rows]
            style = {"color": f"C{color % 10}", "markersize": 5}
            axes.plot(xs, [row["speedup"] for row in rows], "o-", label=label, **style)
            axes.plot(xs, [row["bound"] for row in rows], "_--", linewidth=1, **style)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xlabel=AXES[over], xscale="log")
        ticks = sorted({case[over] for case in cases})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        # Below, where no point can be.
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.28))
    figure.supylabel("speed-up against FlashAttention (dashes: bound by bytes)", fontsize="medium")
    save_figure(figure, out)


def read_cases(path: Path) -> list[dict[str, Any]]:
    """What is drawn of a result file's cases.

    Raises:
        UserError: it is no result of `leank bench attention`.
    """
    results = load_results(path, ATTENTION)
    try:
        cases = [
            {
                "model": results["mask"]["model"],
                **{name: case[name] for name in SERIES[1:]},
                "speedup": case["mean"]["speedup_flash"],
                "bound": case["mean"]["bound_flash"],
            }
            for case in results["cases"]
        ]
    except KeyError as error:
        raise UserError(f"{path}: lacks {error}, so it is no whole result file") from error
    except TypeError as error:
        raise UserError(f"{path}: is not laid out as a result file: {error}") from error
    if not cases:
        raise UserError(f"{path}: has no cases, so there is nothing to draw")
    for number, case in enumerate(cases, 1):
        for name, value in case.items():
            if not _is_valid(name, value):
                raise UserError(
                    f"{path}: {name} of case {number} is {shortened(value)}, not {_kind(name)}; "
                    "give a file as `leank bench attention` wrote it"
                )
    return cases


def _kind(name: str) -> str:
    """What a case's value must be."""
    if name in ("model", "archive_format"):
        return "a text"
    return "a positive number" if name in ("speedup", "bound", *AXES) else "a number"


def _is_valid(name: str, value: Any) -> bool:
    kind = _kind(name)
    if kind == "a text":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < math.inf and (value > 0 or kind == "a number")


def series(cases: Sequence[dict[str, Any]], over: str) -> dict[str, list[dict[str, Any]]]:
    """The lines of a panel, by label: cases that differ in `over` alone, in its order.

    A label names what differs between the cases.
    """
    names = [name for name in SERIES if name != over]
    differing = [name for name in names if len({case[name] for case in cases}) > 1]
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in sorted(cases, key=lambda case: (*(case[name] for name in differing), case[over])):
        label = ", ".join(_describe(name, case[name]) for name in differing)
        lines[label or "leank"].append(case)
    return dict(lines)


def _describe(name: str, value: Any) -> str:
    if name == "model":
        return str(value)
    if name == "archive_format":
        return "archive in the model's dtype" if value == NATIVE.name else f"archive {value}"
    return f"{name} {value:,}"
