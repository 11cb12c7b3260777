"""`leank mask plot`: draw what a mask keeps."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_leank.cli.mask import find
from vllm_leank.cli.outputs import check_new

if TYPE_CHECKING:
    from vllm_leank.mask.mask import Mask


def plot(
    mask: Annotated[str, typer.Argument(metavar="FILE|MODEL", help="A mask file or a model id.")],
    out: Annotated[Path, typer.Option(help="The picture to write: .png, .svg or .pdf.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Draw kept channels, or bits, by head, by channel and by RoPE frequency; needs matplotlib."""
    check_new(out, overwrite)
    from vllm_leank.mask.bits_picture import draw_bits
    from vllm_leank.mask.pictures import draw_mask

    found = find(mask)
    (draw_bits if found.is_packed else draw_mask)(out, found)
    print(f"{out}: the mask for {found.model}")
    for line in _frequencies(found):
        print(line)


def _frequencies(mask: "Mask") -> list[str]:
    """The frequency profile in words."""
    import numpy as np

    from vllm_leank.mask.rope_pairs import NO_ROPE, outlier_pairs, pair_shares, wavelengths

    if mask.geometry.rope_theta is None:
        return [NO_ROPE]
    if mask.is_packed:
        bits = pair_shares(mask.k_bits, mask.geometry)
        quarters = ", ".join(f"{part.mean():.2f}" for part in np.array_split(bits, 4))
        return [f"bits of K by RoPE frequency, from the fastest quarter of the pairs: {quarters}"]
    shares = pair_shares(mask.keep, mask.geometry)
    quarters = ", ".join(f"{part.mean():.1%}" for part in np.array_split(shares, 4))
    lines = [f"kept by RoPE frequency, from the fastest quarter of the pairs: {quarters}"]
    turns = wavelengths(mask.geometry)
    for pair in outlier_pairs(shares):
        beside = [*shares[max(0, pair - 2) : pair], *shares[pair + 1 : pair + 3]]
        lines.append(
            f"pair {pair} (turns once in {turns[pair]:,.0f} tokens) stands out: "
            f"{shares[pair]:.1%} kept, {min(beside):.1%} to {max(beside):.1%} beside it"
        )
    return lines
