"""How each archive format writes and reads pages: one file each, found by the format itself."""

import importlib
from functools import cache

from vllm_leank.kernels.codecs.codec import Codec

from vllm_leank.core.formats import ArchiveFormat

__all__ = ["Codec", "codec_of"]


@cache
def codec_of(archive_format: ArchiveFormat) -> Codec:
    """The codec of a format."""
    module, _, name = archive_format.codec.partition(":")
    codec: Codec = getattr(importlib.import_module(module), name)()
    return codec
