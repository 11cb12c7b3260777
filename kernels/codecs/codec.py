"""What a codec is: how the numbers of an archive format are written and read."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch

from vllm_leank.core.window import GRANULE


class Stored(NamedTuple):
    """A head's granules as pages hold them.

    Attributes:
        key: `[n, 32, kept]`, of the archive's dtype.
        value: `[n, 32, head_dim]`, of the archive's dtype.
        side: what is kept beside them, `[n, side_bytes]` as bytes.
    """

    key: torch.Tensor
    value: torch.Tensor
    side: torch.Tensor


class Codec(ABC):
    """Writes and reads the numbers of an archive format.

    A format's author writes `dtype`, `encode` and `decode` in plain PyTorch, which is all that a
    CPU needs, and `tiles`, the same two for Triton kernels. Pages, places and zeros in empty slots
    are the kernels' work.
    """

    @abstractmethod
    def dtype(self, model: torch.dtype) -> torch.dtype:
        """Dtype of archive pages of a model of this dtype."""

    @abstractmethod
    def encode(self, key: torch.Tensor, value: torch.Tensor) -> Stored:
        """Granules of one head as they are stored.

        Args:
            key: `[n, 32, kept]`, the kept channels, of the model's dtype.
            value: `[n, 32, head_dim]`.
        """

    @abstractmethod
    def decode(self, stored: Stored) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of stored granules, fp32, in the shapes of `encode`."""

    @property
    @abstractmethod
    def tiles(self) -> Any:
        """The same for Triton kernels: a `tiles.Tiles`, made once per class.

        Its device functions must write the bytes that `encode` writes, and read what `decode`
        reads. Only Triton kernels ask for it; on a CPU it may raise `NotImplementedError`.
        """

    def round(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries read of far tokens of one head: K and V once encoded and decoded, fp32.

        Tests and offline measures use it as the format's definition; servers never call it. The
        first token must begin a granule, as the sink's end does. If the last granule is not full,
        zeros fill it, so what comes back of its tokens may differ from what a full one gives.

        Args:
            key: `[tokens, kept]`, the kept channels, at least one, of the model's dtype.
            value: `[tokens, head_dim]`.

        Returns:
            K and V in the same shapes.
        """
        tokens = len(key)
        granules = -(-tokens // GRANULE)
        parts = []
        for part in (key, value):
            padded = part.new_zeros((granules * GRANULE, part.shape[-1]))
            padded[:tokens] = part
            parts.append(padded.view(granules, GRANULE, part.shape[-1]))
        rounded = self.decode(self.encode(*parts))
        key, value = (part.flatten(0, 1)[:tokens] for part in rounded)
        return key, value

    def empty_side(self, count: int, device: torch.device) -> torch.Tensor:
        """Side bytes of granules without a token, `[count, side_bytes]`: such that zeros are read
        from zeros.
        """
        zeros = torch.zeros((count, GRANULE, 1), device=device)
        return self.encode(zeros, zeros).side
