"""Draws masks of bits: K and V by channel, by head and by class."""

from pathlib import Path

import numpy as np

from vllm_leank.mask.bits import CLASSES
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.pictures import check_picture, label_layers, new_figure, save_figure


def draw_bits(path: Path, mask: Mask) -> None:
    """Bits of every channel of K and V, their means by head, and how often each class occurs.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    check_picture(path)
    from matplotlib.colors import BoundaryNorm

    L, H, D = mask.k_bits.shape
    height = 3 + 0.06 * L * H
    figure = new_figure(16, 2 + height)
    grid = figure.add_gridspec(2, 4, width_ratios=(5, 5, 1, 1), height_ratios=(height, 2))
    classes = sorted(CLASSES)
    norm = BoundaryNorm([0, 1, 3, 6, 12, 17], 256)
    for column, (name, bits) in enumerate({"K": mask.k_bits, "V": mask.v_bits}.items()):
        channels = figure.add_subplot(grid[0, column])
        image = channels.imshow(bits.reshape(L * H, D), aspect="auto", cmap="viridis", norm=norm)
        label_layers(channels, mask.geometry.layers, H)
        channels.set(title=f"{name}: {bits.mean():.2f} bits", xlabel=f"{name} channel")
        bar = figure.colorbar(image, ax=channels, label="bits")
        bar.set_ticks([0.5, 2, 4.5, 9, 14.5], labels=[str(kind) for kind in classes])

        heads = figure.add_subplot(grid[0, 2 + column])
        means = heads.imshow(bits.mean(axis=-1), aspect="auto", cmap="magma", vmin=0)
        heads.set(title=f"mean of {name}", xlabel="KV head", ylabel="layer")
        heads.set_xticks(range(H))
        figure.colorbar(means, ax=heads)

        shares = figure.add_subplot(grid[1, column])
        shares.bar([str(kind) for kind in classes], [np.mean(bits == kind) for kind in classes])
        shares.set(xlabel=f"bits of {name}", ylabel="share of channels", ylim=(0, 1))
    save_figure(figure, path)
