"""A picture of what `study.py` measured: points over the bytes of a far token.

    PYTHONPATH=benchmarks python -m real.study_picture study [simulated.json] --out study.png

Points are of the questions that every variant was asked, with 95% intervals; those of simulated
caches (`simulated_study.py`) of what all of these were asked. Left out are choices of far tokens,
which store as much, caches of which nobody knows the bytes, and simulations of leank's and vLLM's.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baselines.unrounded import Unrounded

from real.pictures import label_of, run_picture
from real.served import DENSE
from real.study_table import merged, points, shared_cells
from vllm_leank.errors import UserError
from vllm_leank.mask.pictures import check_picture, new_figure, save_figure

STYLES = {
    "leank": ("C0", "o", "C0"),
    "vLLM": ("C1", "s", "C1"),
    "simulated": ("C2", "^", "white"),
    DENSE: ("grey", "D", "grey"),
}
"""Color, marker and its inside, by whose a cache is."""

LABELS = {"vLLM": ((8, -9), "left", "baseline"), "simulated": ((0, -13), "center", "top")}
"""Offset and alignment of labels that do not stand above their marker."""


def drawn(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Variants that are drawn, dense among them.

    Raises:
        UserError: dense is missing, or there is nothing beside it.
    """
    found = [
        one
        for one in results["variants"]
        if one["token_bytes"] and "pages" not in _options(one["engine_args"])
    ]
    if len(found) < 2 or found[0]["variant"] != DENSE:
        raise UserError("no results of dense attention and another cache")
    return found


def _options(engine_args: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = engine_args.get("additional_config", {}).get("leank", {})
    return options


def others(simulated: dict[str, Any]) -> list[dict[str, Any]]:
    """Simulated caches that are drawn: all but leank's and vLLM's, which engines can be asked."""
    known = DENSE, "leank ", "vLLM ", Unrounded.name
    return [one for one in simulated["variants"] if not one["variant"].startswith(known)]


def draw(results: dict[str, Any], path: Path, simulated: dict[str, Any] | None = None) -> None:
    """Points over bytes, of a study's `results` and, if given, `simulated` caches.

    Raises:
        UserError: the picture cannot be made, or the results are of different models or questions.
    """
    check_picture(path)
    variants = drawn(results)
    cells = shared_cells(variants)
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    found = {one["variant"]: points(one, cells) for one in variants}
    asked = f"{sum(cells.values()):,} questions each"
    rows_of = {title: [one for one in variants if _whose(one) == title] for title in STYLES}
    if simulated is not None:
        for name in ("model", "questions_sha256"):
            if simulated.get(name) != results[name]:
                raise UserError(f"the simulated caches are of another {name}")
        rows_of["simulated"] = others(simulated)
        others_cells = shared_cells(simulated["variants"])
        found |= {one["variant"]: points(one, others_cells) for one in rows_of["simulated"]}
        if others_cells != cells:
            asked += f", simulated caches {sum(others_cells.values()):,}"
    dense = {DENSE: found[DENSE].value}
    if simulated is not None:
        # What they lost is to be seen against dense attention there.
        (alike,) = (one for one in simulated["variants"] if one["variant"] == DENSE)
        dense["simulated"] = points(alike, others_cells).value
    for title, height in dense.items():
        axes.axhline(height, color=STYLES[title][0], linestyle="--", linewidth=0.8)
    for title, rows in rows_of.items():
        if not rows:
            continue
        color, marker, face = STYLES[title]
        xs = [one["token_bytes"] / 1024 for one in rows]
        each = [found[one["variant"]] for one in rows]
        ys = [one.value for one in each]
        reach = [
            [y - (y if one.low is None else one.low) for y, one in zip(ys, each, strict=True)],
            [(y if one.high is None else one.high) - y for y, one in zip(ys, each, strict=True)],
        ]
        axes.errorbar(
            xs, ys, yerr=reach, fmt=marker, color=color, markerfacecolor=face, capsize=3,
            label=title,
        )  # fmt: skip
        told = set[str]()
        for x, y, one in zip(xs, ys, rows, strict=True):
            label = label_of(one["variant"])
            if label not in told:  # ways to prune as many channels are at the same place
                place, ha, va = LABELS.get(title, ((0, 10), "center", "baseline"))
                axes.annotate(
                    label.replace("% ", "%\n"), (x, y), textcoords="offset points",
                    xytext=place, ha=ha, va=va, fontsize="small",
                )  # fmt: skip
            told.add(label)
    highest = max(one.value for one in found.values())
    axes.set(xscale="log", ylim=(-4, highest + 15), ylabel="points of 100")
    axes.set_xlabel("KiB of a far token, all layers")
    ticks = (2, 4, 8, 16, 32)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.set_title(f"{results['model']}: {asked}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower left")
    save_figure(figure, path)


def draw_files(paths: Sequence[Path], out: Path) -> None:
    """`draw` of a study's folder, and of a file of simulated caches if there is one.

    Raises:
        UserError: as `draw`, or there are more.
    """
    folder, *files = paths
    if len(files) > 1:
        raise UserError("give a folder of real.study, and one file of simulated_study at most")
    simulated = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    draw(merged(folder), out, *simulated)


def _whose(variant: dict[str, Any]) -> str:
    if variant["variant"] == DENSE:
        return DENSE
    return "leank" if variant["engine_args"].get("attention_backend") == "leank" else "vLLM"


if __name__ == "__main__":
    run_picture(__doc__, "real.study, and simulated_study", draw_files, nargs="+")
