"""What an archive format is: how far tokens are stored."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from vllm_leank.core.window import GRANULE


@dataclass(frozen=True)
class ArchiveFormat(ABC):
    """How far tokens are stored: bytes, names, and where the code is that writes and reads them.

    Nothing outside a format asks which one it is. Formats without fields are equal if they are of
    one class, and they travel in vLLM's config, so they can be pickled.

    Attributes:
        name: value of the option `archive_dtype`.
        archive: what messages call such an archive.
        capability: least compute capability of a GPU that can read it.
        codec: `module:class` of its `kernels.codec.Codec`, imported where it is used, since plans
            are made without torch.
    """

    name: ClassVar[str]
    archive: ClassVar[str]
    capability: ClassVar[tuple[int, int]] = (8, 0)
    codec: ClassVar[str]

    @abstractmethod
    def itemsize(self, model: int) -> int:
        """Bytes of a stored element of K or V, where the model's have `model`."""

    @property
    def side_bytes(self) -> int:
        """Bytes beside K and V for each head that keeps any channel and each granule; a multiple
        of 4.
        """
        return 0

    def token_bytes(self, kept: int, head_dim: int, model: int) -> float:
        """Bytes of one token of a head that keeps `kept` channels, its share of the side bytes
        included. A head that keeps none has neither K nor V.
        """
        if not kept:
            return 0
        return (kept + head_dim) * self.itemsize(model) + self.side_bytes / GRANULE
