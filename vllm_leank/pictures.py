"""Draws masks and factors; what pictures share."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vllm_leank.atomic import write_atomically
from vllm_leank.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Refuse what could not be drawn, before the work.

    Raises:
        UserError: matplotlib is missing, or the name has none of the `FORMATS`.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: pictures are {', '.join(FORMATS)} files")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error


def draw_learning(
    path: Path,
    factors: npt.NDArray[np.float64],
    keep: npt.NDArray[np.bool_],
    losses: Sequence[Sequence[float]],
) -> None:
    """Factors `[L, H, D]` with what `keep` chose, and the losses of the stages in their order.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    check_picture(path)
    L, H, D = factors.shape
    figure = _figure(12, 3 + 0.05 * L * H)
    left, middle, right = figure.subplots(1, 3, width_ratios=(5, 5, 4))
    for axes, image, title in (
        (left, factors, "factors"),
        (middle, factors * keep, "factors of kept channels"),
    ):
        shown = axes.imshow(image.reshape(L * H, D), vmin=0, vmax=1, aspect="auto", cmap="magma")
        axes.set(title=title, xlabel="K channel", ylabel=f"layer ({H} KV heads each)")
        ticks = range(0, L, max(1, L // 16))
        axes.set_yticks([layer * H - 0.5 for layer in ticks], [str(layer) for layer in ticks])
    figure.colorbar(shown, ax=middle)
    begin = 0
    for number, stage in enumerate(losses, start=1):
        steps = np.arange(begin, begin + len(stage))
        right.plot(steps, stage, linewidth=0.3, color=f"C{number - 1}")
        right.plot(steps, _smooth(stage), color=f"C{number - 1}", label=f"stage {number}")
        begin += len(stage)
    right.set(title="distillation loss", xlabel="step")
    right.set_yscale("symlog", linthresh=1e-4)
    right.legend()
    save_figure(figure, path)


def _smooth(values: Sequence[float], width: int = 20) -> npt.NDArray[np.float64]:
    """Mean of each value and up to `width - 1` before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(sums))
    begins = np.maximum(0, ends - width)
    smoothed: npt.NDArray[np.float64] = (sums[ends] - sums[begins]) / (ends - begins)
    return smoothed


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, min(height, 40)), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib's in the format that its name says, in one step.

    Raises:
        UserError: it cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lower()[1:], dpi=120)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
