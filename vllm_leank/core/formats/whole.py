"""What the formats share that keep channels whole: K chunks as tiles want them, then V."""

from dataclasses import dataclass

from vllm_leank.core.formats.format import ArchiveFormat
from vllm_leank.core.head_part import Chunk, HeadPart
from vllm_leank.core.profile import Profile

CHUNK_WIDTHS = (256, 128, 64, 32, 16)
"""Widths of K chunks, widest first; the last is the finest alignment of a mask. A head has those of
the binary digits of the number of channels that it keeps."""


@dataclass(frozen=True)
class WholeChannels(ArchiveFormat):
    """An element for each kept channel of K and for each of V.

    Kept K channels lie in chunks of the widths that add up to their number, each a power of two, at
    least 16 and widest first (112 = 64 + 32 + 16): tiles have powers of two for sides. V is
    transposed, as the product with the weights wants it. There are no side data.
    """

    def takes(self, profile: Profile) -> bool:
        return Profile(k16=profile.k16, v16=profile.v16) == profile

    def token_bytes(self, profile: Profile, model: int) -> int:
        return (profile.kept + profile.v_kept) * self.itemsize(model)

    def lead(self, profile: Profile) -> int:
        return next((width for width in CHUNK_WIDTHS if profile.kept & width), 0)

    def variant(self, profile: Profile) -> int:
        return profile.kept

    def head_part(self, profile: Profile, block: int, model: int, offset: int) -> HeadPart:
        offset //= self.itemsize(model)
        chunks, first = [], 0
        for width in CHUNK_WIDTHS:
            if profile.kept & width:
                chunks.append(Chunk(offset + first * block, width, first))
                first += width
        values = Chunk(offset + first * block, profile.v_kept, 0)
        end = (values.offset + values.width * block) * self.itemsize(model)
        return HeadPart(profile, tuple(chunks), (values,), side_offset=end)
