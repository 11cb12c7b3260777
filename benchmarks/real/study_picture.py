"""A picture of what `study.py` measured: points over the bytes of a far token.

    PYTHONPATH=benchmarks python -m real.study_picture study --out study.png

Points are of the questions that every variant was asked, with 95% intervals. Left out are choices
of far tokens, which store as much, and caches of which nobody knows the bytes.
"""

from pathlib import Path
from typing import Any

from real.pictures import label_of, run_picture
from real.served import DENSE
from real.study_table import merged, points, shared_cells
from vllm_leank.errors import UserError
from vllm_leank.mask.pictures import check_picture, new_figure, save_figure


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


def draw(results: dict[str, Any], path: Path) -> None:
    """Points over bytes.

    Raises:
        UserError: the picture cannot be made.
    """
    check_picture(path)
    variants = drawn(results)
    cells = shared_cells(variants)
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    found = {one["variant"]: points(one, cells) for one in variants}
    axes.axhline(found[DENSE].value, color="grey", linestyle="--", linewidth=0.8)
    for title, color, marker in (("leank", "C0", "o"), ("vLLM", "C1", "s"), (DENSE, "grey", "D")):
        rows = [one for one in variants if _whose(one) == title]
        xs = [one["token_bytes"] / 1024 for one in rows]
        each = [found[one["variant"]] for one in rows]
        ys = [one.value for one in each]
        reach = [
            [y - (y if one.low is None else one.low) for y, one in zip(ys, each, strict=True)],
            [(y if one.high is None else one.high) - y for y, one in zip(ys, each, strict=True)],
        ]
        axes.errorbar(xs, ys, yerr=reach, fmt=marker, color=color, capsize=3, label=title)
        told = set[str]()
        for x, y, one in zip(xs, ys, rows, strict=True):
            label = label_of(one["variant"])
            if label not in told:  # ways to prune as many channels are at the same place
                beside = title == "vLLM"
                axes.annotate(
                    label.replace("% ", "%\n"), (x, y), textcoords="offset points",
                    xytext=(8, -3) if beside else (0, 10), ha="left" if beside else "center",
                    fontsize="small",
                )  # fmt: skip
            told.add(label)
    highest = max(one.value for one in found.values())
    axes.set(xscale="log", ylim=(-4, highest + 15), ylabel="points of 100")
    axes.set_xlabel("KiB of a far token, all layers")
    ticks = (2, 4, 8, 16, 32)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.set_title(f"{results['model']}: {sum(cells.values()):,} questions each", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower left")
    save_figure(figure, path)


def _whose(variant: dict[str, Any]) -> str:
    if variant["variant"] == DENSE:
        return DENSE
    return "leank" if variant["engine_args"].get("attention_backend") == "leank" else "vLLM"


if __name__ == "__main__":
    run_picture(__doc__, "real.study", lambda folder, out: draw(merged(folder), out))
