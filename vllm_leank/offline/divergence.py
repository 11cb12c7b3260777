"""How far next-token distributions of an archive are from those of full attention."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_leank.errors import UserError

ROWS = 64
"""Distributions compared at once: bounds the memory of large vocabularies."""


@dataclass(frozen=True)
class Divergence:
    """What differs at each of T tokens.

    `kl` is float64 `[T]`, the divergence of the other distribution from the dense one in nats.
    `variation` is float64 `[T]`, their total variation distance, from 0 to 1: half the sum of what
    probabilities differ by. `dense_top` and `other_top` are int64 `[T]`, the most likely tokens.
    """

    kl: npt.NDArray[np.float64]
    variation: npt.NDArray[np.float64]
    dense_top: npt.NDArray[np.int64]
    other_top: npt.NDArray[np.int64]

    @property
    def total(self) -> float:
        """KL of all tokens together, in nats."""
        return float(self.kl.sum())

    @property
    def agree(self) -> int:
        """Tokens at which both have the same most likely token."""
        return int((self.dense_top == self.other_top).sum())


def divergence(dense: torch.Tensor, other: torch.Tensor) -> Divergence:
    """What differs between logits `[T, vocabulary]`, row by row; KL is KL(dense || other).

    Raises:
        UserError: logits are not finite.
    """
    kl, variation, tops = [], [], []
    for left, right in zip(dense.split(ROWS), other.split(ROWS), strict=True):
        p, q = left.float().log_softmax(-1), right.float().log_softmax(-1)
        if not (p.isfinite().all() and q.isfinite().all()):
            raise UserError("the model's logits are not finite; try another --dtype")
        share = p.exp()
        # Rounding may take it below 0, which it is not.
        kl.append((share * (p - q)).sum(-1, dtype=torch.float64).clamp(min=0))
        variation.append((share - q.exp()).abs().sum(-1, dtype=torch.float64) / 2)
        tops.append(torch.stack([p.argmax(-1), q.argmax(-1)]))
    dense_top, other_top = torch.cat(tops, dim=1).cpu().numpy()
    return Divergence(
        torch.cat(kl).cpu().numpy(), torch.cat(variation).cpu().numpy(), dense_top, other_top
    )
