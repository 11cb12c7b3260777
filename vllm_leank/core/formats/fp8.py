"""The archive in 8-bit floats (e4m3), with a scale for each head and granule."""

from dataclasses import dataclass
from typing import ClassVar

from vllm_leank.core.formats.format import ArchiveFormat


@dataclass(frozen=True)
class Fp8(ArchiveFormat):
    """K and V in e4m3; beside them an fp32 scale of K and one of V for each granule, by which the
    granule's largest number becomes 448, the largest of e4m3.
    """

    name: ClassVar[str] = "fp8"
    archive: ClassVar[str] = "fp8 archive"
    capability: ClassVar[tuple[int, int]] = (8, 9)
    codec: ClassVar[str] = "vllm_leank.kernels.codecs.fp8:Fp8Codec"

    def itemsize(self, model: int) -> int:
        return 1

    @property
    def side_bytes(self) -> int:
        return 8


FORMAT = Fp8()
