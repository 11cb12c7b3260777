"""A picture of what `learn_study.py` measured: losses over steps, from each start.

    PYTHONPATH=benchmarks python -m real.learn_picture learn_study.json --out learning.png

A panel for each start. Samples differ, so a curve is the mean of the last 20 steps. Points are the
loss on held-out samples with the mask as served: at a curve's end, and on the way where it was
measured. A dashed line is that of the start's mask.
"""

import json
from pathlib import Path
from typing import Any

from real.pictures import run_picture
from vllm_leank.errors import UserError
from vllm_leank.mask.pictures import check_picture, new_figure, save_figure, smoothed

STARTS = {"fisher": "from Fisher's mask", "learned": "from nothing: after stage 1"}


def draw(results: dict[str, Any], path: Path) -> None:
    """Losses of second stages over steps.

    Raises:
        UserError: the picture cannot be made, or a start has no second stage.
    """
    check_picture(path)
    masks = {row["name"]: row for row in results["masks"]}
    figure = new_figure(10, 4)
    for axes, (start, title) in zip(
        figure.subplots(1, len(STARTS), sharey=True), STARTS.items(), strict=True
    ):
        stages = {name: row for name, row in masks.items() if name.startswith(f"{start} second")}
        if not stages or start not in masks:
            raise UserError(f"there is no second stage from {start}")
        for number, (name, row) in enumerate(stages.items()):
            color, rate = f"C{number}", name.rpartition(" ")[2]
            losses = row["losses"]
            axes.plot(range(1, len(losses) + 1), losses, color=color, linewidth=0.3, alpha=0.6)
            axes.plot(
                range(1, len(losses) + 1), smoothed(losses), color=color, label=f"rate {rate}"
            )
            axes.plot(len(losses) + 3, row["loss"], "o", color=color, clip_on=False)
            if "held_out" in row:  # earlier results have the end alone
                axes.plot(*row["held_out"], "o:", color=color, markersize=3, linewidth=0.8)
        level = masks[start]["loss"]
        axes.axhline(level, color="grey", linestyle="--", linewidth=0.8, label="start, held out")
        axes.set(title=title, xlabel="step of stage 2", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        if start == "fisher":
            axes.set_ylabel("distillation loss")
    save_figure(figure, path)


if __name__ == "__main__":
    run_picture(
        __doc__,
        "real.learn_study",
        lambda path, out: draw(json.loads(path.read_text(encoding="utf-8")), out),
    )
