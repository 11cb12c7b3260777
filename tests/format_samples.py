"""Archive formats for tests that draw what they try: all there are, those added later too."""

import torch
from vllm_leank.kernels.codecs import codec_of

from vllm_leank.core.formats import ArchiveFormat, known_formats


def format_of(seed: int) -> ArchiveFormat:
    """A seed's format: consecutive seeds have all of them, and each has odd and even seeds."""
    formats = known_formats()
    return formats[(seed + seed // len(formats)) % len(formats)]


def rounds(archive_format: ArchiveFormat) -> bool:
    """Whether a format gives back other numbers than it was given."""
    given = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    return not codec_of(archive_format).round(given, given)[0].equal(given)
