"""Draws masks and factors; what pictures share."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from vllm_leank.core.atomic import write_atomically
from vllm_leank.errors import UserError
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.rope_pairs import outlier_pairs, pair_shares, wavelengths

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Refuse what could not be drawn, before the work.

    Raises:
        UserError: matplotlib is missing, or the name has none of the `FORMATS`.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: pictures are {', '.join(FORMATS)} files")
    check_matplotlib()


def check_matplotlib() -> None:
    """Refuse to draw without matplotlib.

    Raises:
        UserError: it is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError("pictures need matplotlib: pip install matplotlib") from error


def draw_learning(
    path: Path,
    factors: npt.NDArray[np.float64],
    mask: "Mask",
    losses: Sequence[Sequence[float]],
    held_out: tuple[Sequence[int], Sequence[float]] = ((), ()),
) -> None:
    """Factors `[L, H, D]` with what `mask` keeps of them, and the losses of the stages in their
    order, of which some may have no steps. `held_out` are numbers of steps of the last stage, and
    the losses after these on samples that are not learned from.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    check_picture(path)
    L, H, D = factors.shape
    figure = new_figure(12, 3 + 0.05 * L * H)
    left, middle, right = figure.subplots(1, 3, width_ratios=(5, 5, 4))
    for axes, image, title in (
        (left, factors, "factors"),
        (middle, factors * mask.keep, "factors of kept channels"),
    ):
        shown = axes.imshow(image.reshape(L * H, D), vmin=0, vmax=1, aspect="auto", cmap="magma")
        axes.set(title=title)
        label_layers(axes, mask.geometry.layers, H)
    figure.colorbar(shown, ax=middle)
    begin = last = 0
    for number, stage in enumerate(losses, start=1):
        if not stage:
            continue
        steps = np.arange(begin, begin + len(stage))
        right.plot(steps, stage, linewidth=0.3, color=f"C{number - 1}")
        right.plot(steps, smoothed(stage), color=f"C{number - 1}", label=f"stage {number}")
        last, begin = begin, begin + len(stage)
    if held_out[0]:
        right.plot(last + np.array(held_out[0]), held_out[1], "ko-", markersize=3, label="held out")
    right.set(title="distillation loss", xlabel="step")
    right.set_yscale("symlog", linthresh=1e-4)
    right.legend()
    save_figure(figure, path)


def draw_mask(path: Path, mask: Mask) -> None:
    """Kept channels by layer and head, by channel, by RoPE pair, and how often each count occurs.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    check_picture(path)
    L, H, D = mask.keep.shape
    has_rope = mask.geometry.rope_theta is not None
    figure = new_figure(13, 5 + 0.06 * L * H)
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 5), height_ratios=(3 + 0.06 * L * H, 3))

    heads = figure.add_subplot(grid[0, 0])
    shown = heads.imshow(mask.kept_counts, vmin=0, vmax=D, aspect="auto", cmap="viridis")
    heads.set(title="kept channels per head", xlabel="KV head", ylabel="layer")
    heads.set_xticks(range(H))
    figure.colorbar(shown, ax=heads)

    channels = figure.add_subplot(grid[0, 1])
    channels.imshow(mask.keep.reshape(L * H, D), aspect="auto", cmap="Greys", vmin=0, vmax=1)
    label_layers(channels, mask.geometry.layers, H)
    channels.set(title=f"kept channels: {mask.k_kept:.1%} of K, {mask.v_kept:.1%} of V")

    counts = figure.add_subplot(grid[1, 0])
    values, times = np.unique(mask.kept_counts, return_counts=True)
    counts.bar([str(value) for value in values], times)
    counts.set(title="heads by kept channels", xlabel="kept channels", ylabel="heads")

    if has_rope:
        _draw_frequencies(figure.add_subplot(grid[1, 1]), mask)
    save_figure(figure, path)


def _draw_frequencies(axes: "Axes", mask: Mask) -> None:
    shares = pair_shares(mask.keep, mask.geometry)
    outliers = outlier_pairs(shares)
    colors = ["C3" if pair in outliers else "C0" for pair in range(len(shares))]
    axes.bar(range(len(shares)), shares, color=colors)
    for pair in outliers:
        axes.annotate(f"pair {pair}", (pair, shares[pair]), ha="center", va="bottom")
    axes.set(title="kept share by RoPE pair, fastest first", ylabel="kept share", ylim=(0, 1.05))
    ticks = range(0, len(shares), max(1, len(shares) // 8))
    turns = wavelengths(mask.geometry)
    axes.set_xticks(ticks, [f"{pair}\n{turns[pair]:,.0f}" for pair in ticks])
    axes.set_xlabel("pair, and in how many tokens it turns once")


def label_layers(axes: "Axes", layers: Sequence[int], num_heads: int) -> None:
    """Name axes over channels and over the heads of one layer after the other."""
    num_layers = len(layers)
    axes.set(xlabel="K channel", ylabel=f"layer ({num_heads} KV heads each)")
    ticks = range(0, num_layers, max(1, num_layers // 16))
    axes.set_yticks([row * num_heads - 0.5 for row in ticks], [str(layers[row]) for row in ticks])


def smoothed(values: Sequence[float], width: int = 20) -> npt.NDArray[np.float64]:
    """Mean of each value and up to `width - 1` before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(sums))
    begins = np.maximum(0, ends - width)
    smoothed: npt.NDArray[np.float64] = (sums[ends] - sums[begins]) / (ends - begins)
    return smoothed


def new_figure(width: float, height: float) -> "Figure":
    """A figure of this many inches, cut at a height of 40."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, min(height, 40)), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib's in the format that its name says, in one step.

    Raises:
        UserError: it cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lower()[1:], dpi=120, bbox_inches="tight")
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
