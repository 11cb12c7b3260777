"""A picture of what `kl.py` measured: KL over the bytes of a far token, leank and caches of others.

    PYTHONPATH=benchmarks python -m real.kl_picture kl.json --out kl.png

Of several files the first has leank's rows, and caches of others come from all; what a file says of
another length is added to rows that the first has. A panel for each length, texts of the kinds that
calibration saw. Left out are archives that engines do not have; caches of others are simulated.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from real.judged_texts import SEEN
from real.pictures import label_of, run_picture
from vllm_leank.errors import UserError
from vllm_leank.mask.pictures import check_picture, new_figure, save_figure

FLOOR = "nothing rounded"
OURS = "leank packed", "leank bits_", "leank pruned_"
THEIRS = "vLLM", "KIVI", "Kitty", "ThinK"
NEAR = 1.6
"""Points are near each other whose bytes and KL are within this factor."""


def joined(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first results, with the lengths of the others, and with those rows of the others that it
    lacks, but for leank's.
    """
    first, *others = results
    rows = {row["name"]: row for row in first["archives"]}
    lengths = list(first["lengths"])
    for one in others:
        lengths += [length for length in one["lengths"] if length not in lengths]
        for row in one["archives"]:
            if (known := rows.get(row["name"])) is not None:
                rows[row["name"]] = known | {"lengths": row["lengths"] | known["lengths"]}
            elif not row["name"].startswith("leank"):
                rows[row["name"]] = row
    return first | {"archives": list(rows.values()), "lengths": lengths}


def drawn(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Archives that are drawn, with their labels; the floor is none of them.

    Raises:
        UserError: there are none.
    """
    found = [
        (label_of(row["name"]), row)
        for row in results.get("archives", [])
        if row["name"].startswith((*OURS, *THEIRS)) and "see one token" not in row["name"]
    ]
    if not found or not results["lengths"]:
        raise UserError("no archives that engines have, or no length that is done")
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """KL over bytes.

    Raises:
        UserError: the picture cannot be made.
    """
    check_picture(path)
    archives, lengths = drawn(results), results["lengths"]
    floor = next((row for row in results["archives"] if row["name"] == FLOOR), None)
    figure = new_figure(5.5 * len(lengths), 8.0)
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for axes, length in zip(panels, lengths, strict=True):
        for ours, color, marker in ((True, "C0", "o"), (False, "C1", "s")):
            rows = [
                one
                for one in archives
                if one[1]["name"].startswith("leank") is ours and str(length) in one[1]["lengths"]
            ]
            xs = [row["token_bytes"] / 1024 for _, row in rows]
            ys = [row["lengths"][str(length)][SEEN]["kl"] for _, row in rows]
            label = "leank" if ours else "others, simulated"
            axes.plot(xs, ys, marker, color=color, label=label)
            points = list(zip(xs, ys, strict=True))
            for (x, y), (name, _) in zip(points, rows, strict=True):
                above = ours or _has_one_below(x, y, points)
                axes.annotate(
                    name, (x, y), fontsize="x-small", textcoords="offset points",
                    xytext=(-5 if ours else 5, 4 if above else -9),
                    ha="right" if ours else "left",
                )  # fmt: skip
        if floor and str(length) in floor["lengths"]:
            level = floor["lengths"][str(length)][SEEN]["kl"]
            axes.axhline(level, color="grey", linestyle="--", linewidth=0.8, label=FLOOR)
        axes.set(xscale="log", yscale="log", xlabel="KiB of a far token, all layers")
        ticks = (2, 4, 8, 16)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.margins(x=0.32)
        axes.set_title(f"{results['model']}, {length:,} tokens", fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("KL to full attention, nats per token")
    panels[0].legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 0.07))
    save_figure(figure, path)


def _has_one_below(x: float, y: float, points: Sequence[tuple[float, float]]) -> bool:
    """Whether a point so near that labels would meet is lower."""
    return any(other < y < NEAR * other and 1 / NEAR < x / at < NEAR for at, other in points)


if __name__ == "__main__":
    run_picture(
        __doc__,
        "real.kl",
        lambda paths, out: draw(
            joined([json.loads(path.read_text(encoding="utf-8")) for path in paths]), out
        ),
        nargs="+",
    )
