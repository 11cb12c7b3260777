"""The archive in 8-bit floats (e4m3), with a scale for each head and granule."""

from dataclasses import dataclass
from typing import ClassVar

from vllm_leank.core.formats.whole import WholeChannels


@dataclass(frozen=True)
class Fp8(WholeChannels):
    """K and V in e4m3; beside them an fp32 scale of K and one of V for each granule, by which the
    granule's largest number becomes 448, the largest of e4m3.
    """

    name: ClassVar[str] = "fp8"
    archive: ClassVar[str] = "fp8 archive"
    capability: ClassVar[tuple[int, int]] = (8, 9)
    codec: ClassVar[str] = "vllm_leank.kernels.codecs.fp8:Fp8Codec"
    side_bytes: ClassVar[int] = 8
    behind_bytes: ClassVar[int] = 8

    def itemsize(self, model: int) -> int:
        return 1


FORMAT = Fp8()
