"""What an archive format is: how far tokens are stored."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from vllm_leank.core.head_part import HeadPart
from vllm_leank.core.profile import Profile
from vllm_leank.core.window import GRANULE


@dataclass(frozen=True)
class ArchiveFormat(ABC):
    """How far tokens are stored: bytes, names, and where the code is that writes and reads them.

    Nothing outside a format asks which one it is. Formats without fields are equal if they are of
    one class, and they travel in vLLM's config, so they can be pickled.

    Attributes:
        name: what results and metrics call it.
        archive: what messages call such an archive.
        codec: `module:class` of its `kernels.codec.Codec`, imported where it is used, since plans
            are made without torch.
        blocks: numbers of tokens that an archive page may have, ascending.
        longer_blocks: more of them for models with states: they share no prefixes, which end with
            whole pages, and it may take many tokens to fill a block that is as large as a state.
        side_bytes: bytes beside K and V for each head that stores anything and each granule; a
            multiple of 4.
        together: granules whose tokens alternate in each row of V: with 2, token 0 of the first,
            token 0 of the second, token 1 of the first, and so on.
    """

    name: ClassVar[str]
    archive: ClassVar[str]
    codec: ClassVar[str]
    blocks: ClassVar[tuple[int, ...]] = tuple(range(GRANULE, 257, GRANULE))
    longer_blocks: ClassVar[tuple[int, ...]] = tuple(range(256 + GRANULE, 1025, GRANULE))
    side_bytes: ClassVar[int] = 0
    together: ClassVar[int] = 1

    @abstractmethod
    def takes(self, profile: Profile) -> bool:
        """Whether a head of this profile can be stored."""

    @abstractmethod
    def itemsize(self, model: int) -> int:
        """Bytes of a stored element of K or V, where the model's have `model`."""

    @abstractmethod
    def token_bytes(self, profile: Profile, model: int) -> int:
        """Bytes of one token of a head, its share of side bytes included."""

    @abstractmethod
    def head_part(self, profile: Profile, block: int, model: int, offset: int) -> HeadPart:
        """Where the fields of a head that stores anything lie.

        Args:
            profile: the head's.
            block: tokens of an archive page.
            model: bytes of an element of the model's dtype.
            offset: byte of the page where the head begins.
        """

    def lead(self, profile: Profile) -> int:
        """Channels of a head's *lead*, its first field of K, which are the first in stored order.
        Queries that read the best far tokens alone choose by it. 0: they cannot choose.
        """
        return 0

    @abstractmethod
    def variant(self, profile: Profile) -> int:
        """A number above 0 that tells kernels all of a profile that stores anything."""
