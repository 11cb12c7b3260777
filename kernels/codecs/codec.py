"""What a codec is: how the numbers of an archive format are written and read."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from vllm_leank.kernels.channels import HeadChannels

from vllm_leank.core.pages import CacheLayout
from vllm_leank.core.profile import Profile
from vllm_leank.core.window import GRANULE


class Stored(NamedTuple):
    """A head's granules as pages hold them: the elements of each token, all chunks of K, or of V,
    one behind the other.

    Attributes:
        key: `[n, 32, k elements]`, of the archive's dtype.
        value: `[n, 32, v elements]`, of the archive's dtype.
        side: what is kept beside them, `[n, side_bytes]` as bytes.
    """

    key: torch.Tensor
    value: torch.Tensor
    side: torch.Tensor


class Requests(Enum):
    """How many requests a decode launch has: one, whose programs run all at once; few, of which one
    wave is made as well; or many.
    """

    ONE = "one"
    FEW = "few"
    MANY = "many"


@dataclass(frozen=True)
class DecodeShape:
    """How a format's decode is launched.

    Attributes:
        tile: most tokens of a tile, a power of two.
        warps: warps of a program.
        stages: depth of the software pipeline over archive tiles.
        window_stages: the same over window pages.
        window_tile: tokens of a window page that are read at once: a power of two from 16 to 32.
        registers: most registers of a thread; None leaves it to the compiler. Fewer of them let
            more programs run at once, where instructions and not bytes are the limit.
        wave: equal parts into which all that is read is cut. Of few requests they run at the same
            time. Of many they are some waves, of codes whole ones of a Hopper GPU.
        window_cost: how many times as long as archive tiles of as many bytes a granule of the
            window takes, where one wave is cut into equal programs.
    """

    tile: int = 64
    warps: int = 2
    stages: int = 3
    window_stages: int = 4
    window_tile: int = 32
    registers: int | None = None
    wave: int = 256
    window_cost: int = 1


class Codec(ABC):
    """Writes and reads the numbers of an archive format.

    A format's author writes `dtype`, `encode` and `decode` in plain PyTorch, which is all that a
    CPU needs, and `tiles`, the same for Triton kernels. Pages and places are the kernels' work.

    Attributes:
        side_dtype: of the numbers that are kept beside K and V.
        any_codes: whether V is finite whatever bytes there are, if its side bytes are.
        extend_shape: rows, tile, warps and stages of extend on Hopper: the fastest of those tried.
        whole_channels: whether each stored channel has elements of its own.
    """

    side_dtype: torch.dtype = torch.float32
    any_codes: bool = False
    extend_shape: tuple[int, int, int, int] = 128, 64, 4, 2
    whole_channels: bool = True

    @abstractmethod
    def dtype(self, model: torch.dtype) -> torch.dtype:
        """Dtype of archive pages of a model of this dtype."""

    @abstractmethod
    def encode(self, key: torch.Tensor, value: torch.Tensor, head: HeadChannels) -> Stored:
        """Granules of one head as they are stored.

        Args:
            key: `[n, 32, head_dim]`, all channels, of the model's dtype.
            value: like `key`.
            head: the head's channels.
        """

    @abstractmethod
    def decode(self, stored: Stored, head: HeadChannels) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored channels of K and of V, fp32 `[n, 32, stored]` each, in the order of
        `Channels.stored`. The others are their means, which is not for the codec to say.
        """

    @property
    @abstractmethod
    def tiles(self) -> Any:
        """The same for Triton kernels: a `tiles.Tiles`, made once per class.

        Its device functions must write the bytes that `encode` writes, and read what `decode`
        reads. Only Triton kernels ask for it; on a CPU it may raise `NotImplementedError`.
        """

    def decode_shape(
        self, layout: CacheLayout, requests: Requests = Requests.FEW, short_tiles: bool = False
    ) -> DecodeShape:
        """How decode is launched, on Hopper the fastest of those tried; the same for all layers of
        a model, by `layout.variants`. Tiles of one request are as long as those of few, those of
        many multiples of these, or with `short_tiles` the same. Waves are alike.
        """
        return DecodeShape(wave=4096) if requests is Requests.MANY else DecodeShape()

    def query_places(self, profile: Profile, head_dim: int) -> torch.Tensor:
        """Where decode keeps a query's number for each stored channel of K of a head, int64
        `[head_dim]`.
        """
        return torch.arange(head_dim)

    @property
    def empty_side(self) -> torch.Tensor:
        """Side bytes of a granule without a token, `[side_bytes]`: such that its V is finite."""
        return torch.empty(0, dtype=torch.uint8)

    def round(
        self, key: torch.Tensor, value: torch.Tensor, head: HeadChannels
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries read of far tokens of one head: K and V once encoded and decoded, fp32.

        Tests and offline measures use it as the format's definition; servers never call it. The
        first token must begin a granule, as the sink's end does. If the last granule is not full,
        zeros fill it, so what comes back of its tokens may differ from what a full one gives.

        Args:
            key: `[tokens, head_dim]`, all channels, of the model's dtype.
            value: like `key`.
            head: the head's channels.

        Returns:
            K and V in the same shapes; channels that are not stored are their means.
        """
        tokens = len(key)
        granules = -(-tokens // GRANULE)
        parts = []
        for part in (key, value):
            padded = part.new_zeros((granules * GRANULE, part.shape[-1]))
            padded[:tokens] = part
            parts.append(padded.view(granules, GRANULE, part.shape[-1]))
        key, value = parts
        key, value = self.decode(self.encode(key, value, head), head)
        return (
            head.k.complete(key).flatten(0, 1)[:tokens],
            head.v.complete(value).flatten(0, 1)[:tokens],
        )
