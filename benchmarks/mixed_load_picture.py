"""A picture of what `mixed_load.py` measured: latencies and throughput of each engine at each rate.

    python benchmarks/mixed_load_picture.py mixed_load.json --out mixed_load.png

Points of latencies are medians, lines end at the 99th percentile. Cells of which requests failed or
were given up are left out.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from matplotlib.ticker import LogLocator, NullFormatter
from mixed_load import KIND, is_whole

from vllm_leank.bench.results import load_results
from vllm_leank.errors import UserError
from vllm_leank.mask.pictures import check_picture, new_figure, save_figure

PANELS: dict[str, Callable[[dict[str, Any]], tuple[float, float | None]]] = {
    "first token, s": lambda cell: (cell["ttft_ms"]["p50"] / 1e3, cell["ttft_ms"]["p99"] / 1e3),
    "between tokens, ms": lambda cell: (cell["itl_ms"]["p50"], cell["itl_ms"]["p99"]),
    "output tokens per s": lambda cell: (cell["output_tokens_per_s"], None),
    "good requests per s": lambda cell: (cell["good_requests_per_s"], None),
}
"""What a panel shows of a cell: a height, and where its line ends."""

LOGARITHMIC = "first token, s", "between tokens, ms"


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel for each figure, with a group of bars for each rate.

    Raises:
        UserError: no cell was measured, or the picture cannot be made.
    """
    check_picture(path)
    cells = list(filter(is_whole, results["cells"]))
    if not cells:
        raise UserError("no cell was measured whole")
    rates = sorted({cell["rate"] for cell in cells})
    variants = list(dict.fromkeys(cell["variant"] for cell in cells))
    width = 0.8 / len(variants)
    figure = new_figure(13, 3.8)
    for axes, (title, figures) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for number, variant in enumerate(variants):
            rows = [cell for cell in cells if cell["variant"] == variant]
            at = [
                rates.index(row["rate"]) + (number - (len(variants) - 1) / 2) * width
                for row in rows
            ]
            heights, ends = zip(*map(figures, rows), strict=True)
            style = {"color": f"C{number}", "label": variant}
            if title in LOGARITHMIC:
                axes.plot(at, heights, "o", **style)
                axes.vlines(at, heights, ends, color=f"C{number}", linewidth=1.5)
                axes.plot(at, ends, "_", color=f"C{number}", markersize=8)
            else:
                axes.bar(at, heights, 0.9 * width, **style)
        axes.set_title(title, fontsize="medium")
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_xlim(-0.5, len(rates) - 0.5)
        axes.set_xlabel("requests per second")
        if title in LOGARITHMIC:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.axes[0].legend(fontsize="small")
    load = results["load"]
    prompts, answers = (
        "{:,} to {:,}".format(*load[name]) for name in ("prompt_tokens", "output_tokens")
    )
    figure.suptitle(
        f"{load['model']}, prompts of {prompts} tokens, answers of {answers}", fontsize="medium"
    )
    save_figure(figure, path)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="png, svg or pdf")
    args = parser.parse_args()
    try:
        draw(load_results(args.results, KIND), args.out)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
