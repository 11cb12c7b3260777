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
    """Writes and reads the numbers of an archive format in plain PyTorch."""

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
        """The format's device functions, a `tiles.Tiles`. Asked for where Triton is used alone."""

    def round(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What an archive gives back of K `[tokens, kept]` and V `[tokens, head_dim]` of one head,
        fp32. Tokens begin at a granule; a last one that is not full counts as filled with zeros.
        """
        tokens = len(key)
        parts = []
        for part in (key, value):
            padded = part.new_zeros((-(-tokens // GRANULE) * GRANULE, part.shape[-1]))
            padded[:tokens] = part
            parts.append(padded.unflatten(0, (-1, GRANULE)))
        rounded = self.decode(self.encode(*parts))
        key, value = (part.flatten(0, 1)[:tokens] for part in rounded)
        return key, value

    def empty_side(self, count: int, device: torch.device) -> torch.Tensor:
        """Side bytes of granules without a token, `[count, side_bytes]`: such that zeros are read
        from zeros.
        """
        zeros = torch.zeros((count, GRANULE, 1), device=device)
        return self.encode(zeros, zeros).side
