"""Draw what `recall.learn_study` measured; needs matplotlib.

PYTHONPATH=benchmarks python -m recall.plot_study --out docs/images/accuracy.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from recall.tasks import TASKS

METHODS = {
    "reg 0.06": ("learned", "C0", "o-"),
    "reg 0.06, without stage 2": ("learned, stage 1 alone", "C0", "o:"),
    "calibrated": ("calibrated", "C1", "s-"),
    "uniform energy": ("same budget for all heads", "C2", "^-"),
    "global energy": ("raw energy, no far mass", "C3", "v-"),
    "slow heads": ("whole heads, by frequency", "C4", "d-"),
    "ThinK": ("ThinK, anew for each prompt", "C5", "x--"),
    "random": ("random", "grey", ".-"),
}
"""Method in the results: label, colour and style of its line."""


def main() -> None:
    """Draw the mean over everything, and below it the longest contexts of each task."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = here.parent / "results" / "recall_learn_study.json"
    parser.add_argument("results", type=Path, nargs="?", default=results)
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    args = parser.parse_args()
    study = json.loads(args.results.read_text(encoding="utf-8"))

    figure = plt.figure(figsize=(11, 8), layout="constrained")
    grid = figure.add_gridspec(2, len(TASKS), height_ratios=(3, 2))
    top = figure.add_subplot(grid[0, :])
    draw(top, study["cells"], "mean over all tasks and lengths")
    top.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4)
    longest = max(cell["length"] for cell in study["cells"])
    for column, task in enumerate(TASKS):
        cells = [c for c in study["cells"] if (c["task"], c["length"]) == (task, longest)]
        draw(figure.add_subplot(grid[1, column]), cells, f"{task}, {longest // 1024}K tokens")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


def draw(axes: Any, cells: list[dict[str, Any]], title: str) -> None:
    """One line per method: right answers over the share of K channels that is pruned."""
    total = sum(cell["n"] for cell in cells)
    for method, (label, color, style) in METHODS.items():
        ratios = sorted(
            float(name.rpartition(", ")[2])
            for name in cells[0]["exact"]
            if name.rpartition(", ")[0] == method
        )
        right = [
            100 * sum(cell["exact"][f"{method}, {ratio}"] for cell in cells) / total
            for ratio in ratios
        ]
        axes.plot(ratios, right, style, color=color, label=label, markersize=4, linewidth=1.2)
    axes.set(title=title, xlabel="share of K pruned", ylabel="right answers, %", ylim=(-3, 103))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
