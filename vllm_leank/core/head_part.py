"""The part of a KV head in a layer's archive page: fields, each with a place of its own."""

from dataclasses import dataclass

from vllm_leank.core.profile import Profile


@dataclass(frozen=True)
class Chunk:
    """Columns of one head's stored K, or rows of its stored V, that lie together.

    Attributes:
        offset: first element within the page. K: token i has its row at `offset + i * width`. V is
            transposed: row i begins at `offset + i * archive_block`.
        width: elements of a token.
        first: index of the chunk's first element among those of a token.
    """

    offset: int
    width: int
    first: int


@dataclass(frozen=True)
class HeadPart:
    """The part of a KV head that stores anything.

    Attributes:
        profile: its class widths.
        k_chunks: its K `[archive_block, width]` each, one behind the other.
        v_chunks: its V `[width, archive_block]` each, one behind the other.
        side_offset: first byte of what the format keeps beside K and V,
            `[archive_block // 32, side_bytes]` in the format's own order.
    """

    profile: Profile
    k_chunks: tuple[Chunk, ...]
    v_chunks: tuple[Chunk, ...]
    side_offset: int

    @property
    def kept(self) -> int:
        """Stored K channels."""
        return self.profile.kept

    @property
    def offset(self) -> int:
        """First element."""
        return (*self.k_chunks, *self.v_chunks)[0].offset

    @property
    def k_offset(self) -> int:
        """First element of K."""
        return self.k_chunks[0].offset

    @property
    def v_offset(self) -> int:
        """First element of V."""
        return self.v_chunks[0].offset
