"""What the pictures share: their command line, and what they call a cache."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from baselines.ends_whole import ENDS, whole_name

from vllm_leank.errors import UserError


def run_picture(
    description: str | None, written_by: str, draw: Callable[[Any, Path], None], **results: Any
) -> None:
    """The command that draws results to `--out`.

    Args:
        description: what is drawn.
        written_by: what wrote the results.
        draw: takes the path of the results, or their list, and that of the picture.
        results: more of argparse's options of that argument.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help=f"what {written_by} wrote", **results)
    parser.add_argument("--out", type=Path, required=True, help="a PNG, SVG or PDF file")
    args = parser.parse_args()
    try:
        draw(args.results, args.out)
    except (OSError, UserError, ValueError, KeyError) as error:
        sys.exit(f"error: {error}")


def label_of(name: str) -> str:
    """Of its name in a file of results: that of a mask's file (`bits_4`, `pruned_70`), with or
    without `leank`, or what vLLM calls its own.
    """
    for prefix in ("leank packed, ", "leank ", "vLLM ", "vllm_"):
        name = name.removeprefix(prefix)
    if name.endswith(f"_{ENDS}"):
        name = whole_name(name.removesuffix(f"_{ENDS}"))
    kind, _, number = name.partition("_")
    if kind == "bits":
        return f"{number} bit" if number == "1" else f"{number} bits"
    if number.isdecimal():
        return f"{number}% pruned"
    return name.replace("turboquant_", "TurboQuant ").split(", an")[0]
