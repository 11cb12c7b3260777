"""The archive in the model's own dtype: LeanK as published."""

from dataclasses import dataclass
from typing import ClassVar

from vllm_leank.core.formats.format import ArchiveFormat


@dataclass(frozen=True)
class Native(ArchiveFormat):
    """Kept channels as they are in window pages."""

    name: ClassVar[str] = "auto"
    archive: ClassVar[str] = "archive"
    codec: ClassVar[str] = "vllm_leank.kernels.codecs.native:NativeCodec"

    def itemsize(self, model: int) -> int:
        return model
