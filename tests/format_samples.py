"""Archive formats for tests that draw what they try: all there are, those added later too."""

from pathlib import Path

import numpy as np
import torch
from archive_definition import PACKED, archive_of
from mask_samples import coded_mask, random_mask
from oracle import Oracle
from vllm_leank.kernels.channels import layer_channels
from vllm_leank.kernels.codecs import codec_of

from vllm_leank.core.formats import ArchiveFormat, formats_for, known_formats
from vllm_leank.core.profile import Profile
from vllm_leank.mask.mask import Mask


def whole_formats() -> tuple[ArchiveFormat, ...]:
    """Those that take masks of LeanK's kind."""
    return formats_for([[Profile(k16=16, v16=64)]])


def format_of(seed: int) -> ArchiveFormat:
    """A seed's format: consecutive seeds have all of them, and each has odd and even seeds."""
    formats = known_formats()
    return formats[(seed + seed // len(formats)) % len(formats)]


def mask_of(archive_format: ArchiveFormat, model: Path, counts: list[int], seed: int = 0) -> Mask:
    """A random mask that the format takes; `counts` as in `random_mask`."""
    if archive_format == PACKED:
        return coded_mask(model, seed)
    return random_mask(model, counts, seed=seed)


def oracle_of(
    archive_format: ArchiveFormat, model: Path, mask: Mask, sink: int, recent: int
) -> Oracle:
    """The oracle of a mask of `mask_of`."""
    return Oracle(
        model,
        (mask.k_bits | mask.v_bits) > 0 if mask.is_packed else mask.keep,
        sink,
        recent,
        archive_format=archive_format,
        archive=archive_of(mask) if mask.is_packed else None,
    )


def rounds(archive_format: ArchiveFormat) -> bool:
    """Whether a format gives back other numbers than it was given."""
    if archive_format == PACKED:
        return True
    given = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    (head,) = layer_channels(*np.full((2, 1, 64), 16, np.uint8)).heads
    return not codec_of(archive_format).round(given, given, head)[0].equal(given)
