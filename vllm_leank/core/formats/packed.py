"""The archive in codes of 8, 4 and 2 bits, by what each channel needs."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from vllm_leank.core.formats.format import ArchiveFormat
from vllm_leank.core.head_part import Chunk, HeadPart
from vllm_leank.core.profile import CLASSES, Profile
from vllm_leank.core.window import GRANULE

CODE_CLASSES = CLASSES[1:]
"""Bits of a code, in the order of the fields."""

STEPS = {8: 1 / 24, 4: 0.335, 2: 0.996}
"""Distance of two codes, in standard deviations of a channel: what codes of so many bits, evenly
spaced, lose least with where numbers are normally distributed."""

LEFT = {8: 0.000145, 4: 0.01154, 2: 0.1188}
"""What codes with these steps leave of the variance of a normal distribution: the mean square of
their errors."""

ROW_BYTES = frozenset((0, 16, 32, 64, 128, 256))
"""Bytes that a token may have in a class: tiles have powers of two for sides, and loads 16 bytes.
So a head has 0, 16, 32, ... channels of 8 bits, twice as many of 4, or four times as many of 2."""


def class_counts(bits: int) -> tuple[int, ...]:
    """How many channels of so many bits a head may have in its K, and in its V."""
    return tuple(row * 8 // bits for row in sorted(ROW_BYTES))


LEAST_SCALE = 2.0**-14
"""Of a token: the smallest number that fp16 holds with all its digits."""

LARGEST_SCALE = 65504.0
"""The largest number of fp16."""

TILE_TOKENS = 128
"""Tokens of a tile, which kernels read at once: pages have whole tiles."""


@dataclass(frozen=True)
class Packed(ArchiveFormat):
    """Codes of channels sorted by class, and a scale of V for each token.

    A head's fields, in bytes, one behind the other and each at a multiple of 16: K of 8 bits
    `[block, k8]`, of 4 bits `[block, k4 / 2]`, of 2 bits `[block, k2 / 4]`; V transposed, of 8 bits
    `[v8, block]`, of 4 bits `[v4 / 2, block]`, of 2 bits `[v2 / 4, block]`; then a scale of V for
    each token, fp16 `[block]`. Codes of one byte are far apart: with n of them, field i of byte j
    is channel `j + i * width / n` of its class, so that a load gives whole runs of channels. In
    rows of V the tokens of two granules alternate: the two bytes of half a word are 32 tokens
    apart, and kernels read them as two tiles.

    """

    name: ClassVar[str] = "packed"
    archive: ClassVar[str] = "packed archive"
    codec: ClassVar[str] = "vllm_leank.kernels.codecs.packed:PackedCodec"
    blocks: ClassVar[tuple[int, ...]] = tuple(range(TILE_TOKENS, 1025, TILE_TOKENS))
    longer_blocks: ClassVar[tuple[int, ...]] = tuple(range(1024 + TILE_TOKENS, 4097, TILE_TOKENS))
    side_bytes: ClassVar[int] = 2 * GRANULE
    together: ClassVar[int] = 2

    def takes(self, profile: Profile) -> bool:
        widths = [*_row_bytes(profile.k), *_row_bytes(profile.v)]
        return not (profile.k16 or profile.v16) and ROW_BYTES.issuperset(widths)

    def itemsize(self, model: int) -> int:
        return 1

    def token_bytes(self, profile: Profile, model: int) -> int:
        codes = sum(_row_bytes(profile.k)) + sum(_row_bytes(profile.v))
        return codes + 2 * profile.stores

    def lead(self, profile: Profile) -> int:
        return next(filter(None, profile.k[1:]), 0)

    def variant(self, profile: Profile) -> int:
        """Widths of rows in units of 16 bytes, five bits each: K of 8, 4 and 2 bits, then V."""
        widths = [*_row_bytes(profile.k), *_row_bytes(profile.v)]
        return sum(width // 16 << (5 * i) for i, width in enumerate(widths))

    def head_part(self, profile: Profile, block: int, model: int, offset: int) -> HeadPart:
        keys, values = sum(_row_bytes(profile.k)), sum(_row_bytes(profile.v))
        v_offset = offset + keys * block
        return HeadPart(
            profile,
            k_chunks=tuple(_chunks(profile.k, block, offset)),
            v_chunks=tuple(_chunks(profile.v, block, v_offset)),
            side_offset=v_offset + values * block,
        )


def _row_bytes(counts: tuple[int, ...]) -> list[int]:
    """Bytes of a token's codes by class."""
    return [count * bits // 8 for bits, count in zip(CODE_CLASSES, counts[1:], strict=True)]


def _chunks(counts: tuple[int, ...], block: int, offset: int) -> Iterator[Chunk]:
    """Fields of one head's K or V that lie from `offset` on; empty classes have none."""
    ends = [0]
    for width in _row_bytes(counts):
        ends.append(ends[-1] + width)
    for first, end in pairwise(ends):
        if end > first:
            yield Chunk(offset + first * block, end - first, first)


FORMAT = Packed()
