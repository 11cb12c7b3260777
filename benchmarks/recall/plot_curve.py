"""Draw the training curve; needs matplotlib.

    PYTHONPATH=benchmarks python -m recall.plot_curve

Reads `training_curve.json` beside this file and writes `training_curve.png` there.
"""

import json
from pathlib import Path

from matplotlib import pyplot as plt

from recall.stream import KINDS

COLORS = {
    "lookup": "#2166ac",
    "multivalue": "#b2182b",
    "tracking": "#1b7837",
    "periodic": "#999999",
}


def main() -> None:
    """Draw accuracy per kind of row, and below it the longest row."""
    here = Path(__file__).parent
    curve = json.loads((here / "training_curve.json").read_text(encoding="utf-8"))
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for kind in KINDS:
        points = [(p["seconds"], 100 * p[kind]) for p in curve if p[kind] is not None]
        top.plot(*zip(*points, strict=True), color=COLORS[kind], label=kind, linewidth=1.2)
    top.set_ylabel("answer tokens right, %")
    top.legend(frameon=False, loc="lower right")
    bottom.step([p["seconds"] for p in curve], [p["max_length"] for p in curve], color="black")
    bottom.set_yscale("log", base=2)
    bottom.set_yticks([256, 1024, 4096, 16384], labels=["256", "1K", "4K", "16K"])
    bottom.set_ylabel("longest row")
    bottom.set_xlabel("seconds of training")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(here / "training_curve.png", dpi=120)


if __name__ == "__main__":
    main()
