"""Archive formats for tests that draw what they try: all there are, those added later too."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from archive_definition import profiles_for
from mask_samples import coded_mask, random_mask
from vllm_leank.kernels.channels import HeadChannels, layer_channels
from vllm_leank.kernels.codecs import codec_of

from vllm_leank.core.formats import ArchiveFormat, known_formats
from vllm_leank.core.profile import CLASSES
from vllm_leank.mask.mask import Mask


def format_of(seed: int) -> ArchiveFormat:
    """A seed's format: consecutive seeds have all of them, and each has odd and even seeds."""
    formats = known_formats()
    return formats[(seed + seed // len(formats)) % len(formats)]


def mask_for(
    archive_format: ArchiveFormat, model: Path, kept: Sequence[int], seed: int = 0
) -> Mask:
    """A random mask that a format can hold: of heads that keep so many channels in 16 bits, or, for
    a format of codes, of some classes.
    """
    whole = random_mask(model, list(kept), seed=seed)
    heads = {profile for layer in whole.profiles for profile in layer}
    return whole if all(map(archive_format.takes, heads)) else coded_mask(model, seed)


def head_for(archive_format: ArchiveFormat, kept: int, head_dim: int) -> HeadChannels:
    """A head whose first `kept` channels of K are stored; means are 0 and scales 1."""
    ((profile,),) = profiles_for(archive_format, [[kept]], head_dim)
    bits = np.zeros((2, 1, head_dim), np.uint8)
    for row, counts in zip(bits[:, 0], (profile.k, profile.v), strict=True):
        row[: sum(counts)] = np.repeat(CLASSES, counts)
    numbers = {
        f"{kind}_{name}": np.full((1, head_dim), number, np.float16)
        for kind in "kv"
        for name, number in (("mean", 0), ("scale", 1))
    }
    return layer_channels(*bits, numbers).heads[0]


def rounds(archive_format: ArchiveFormat) -> bool:
    """Whether a format gives back other numbers than it was given."""
    given = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    head = head_for(archive_format, 64, 64)
    return not codec_of(archive_format).round(given, given, head)[0].equal(given)
