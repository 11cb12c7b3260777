"""What a layer knows of its heads' channels without reading pages: their order, means and codes.

All of it follows from the mask, and stays the same while a server runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from vllm_leank.core.formats.packed import STEPS
from vllm_leank.core.pages import CacheLayout
from vllm_leank.core.profile import CLASSES, Profile

KINDS = "k", "v"
"""Order of K and V in the tensors."""


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one head's K or V, in the order in which they are stored: by class, most bits
    first, ascending within a class; those of 0 bits at the end.

    Attributes:
        counts: channels of each of `CLASSES`.
        order: int64 `[head_dim]`, the channels.
        mean: fp32 `[head_dim]`, what is known of a far token's channel without storing it.
        factor: fp32 `[head_dim]`, distance of two codes: a step times the channel's scale. 0 where
            no codes are stored.
        inverse: fp32 `[head_dim]`, 1 over `factor`: codes are made by products, which have the same
            bits on every device. 0 where no codes are stored.
    """

    counts: tuple[int, int, int, int]
    order: torch.Tensor
    mean: torch.Tensor
    factor: torch.Tensor
    inverse: torch.Tensor

    @property
    def stored(self) -> torch.Tensor:
        """int64 `[stored]`: the channels that are stored."""
        return self.order[: sum(self.counts)]

    def complete(self, stored: torch.Tensor) -> torch.Tensor:
        """All channels `[..., head_dim]`, in the head's own order, from those that are stored,
        fp32 `[..., stored]`: the others are their means.
        """
        known = self.mean[stored.shape[-1] :].expand(*stored.shape[:-1], -1)
        return self._in_own_order(torch.cat((stored, known), dim=-1))

    def products(self, queries: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """Products `[..., n, tokens]` of queries `[..., n, head_dim]` with what `complete` makes of
        the stored channels `[..., tokens, stored]`, which are not completed for it.
        """
        queries, count = queries[..., self.order], stored.shape[-1]
        return queries[..., :count] @ stored.mT + queries[..., count:] @ self.mean[count:, None]

    def sums(self, weights: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """Sums `[..., n, head_dim]` of tokens with weights `[..., n, tokens]`; as `products`."""
        known = weights.sum(-1, keepdim=True) * self.mean[stored.shape[-1] :]
        return self._in_own_order(torch.cat((weights @ stored, known), dim=-1))

    def _in_own_order(self, channels: torch.Tensor) -> torch.Tensor:
        whole = torch.empty_like(channels)
        whole[..., self.order] = channels
        return whole


@dataclass(frozen=True, eq=False)
class HeadChannels:
    """K and V of one KV head."""

    profile: Profile
    k: Channels
    v: Channels


@dataclass(frozen=True, eq=False)
class LayerChannels:
    """The KV heads of one layer on one rank.

    Attributes:
        profiles: class widths of each head.
        order: int64 `[2, num_kv_heads, head_dim]`, of K and of V; see `Channels`.
        numbers: fp32 `[3, 2, num_kv_heads, head_dim]`: means, factors, inverse factors.
    """

    profiles: tuple[Profile, ...]
    order: torch.Tensor
    numbers: torch.Tensor

    @cached_property
    def heads(self) -> tuple[HeadChannels, ...]:
        """Each KV head's channels, as views."""
        return tuple(
            HeadChannels(
                profile,
                *(
                    Channels(counts, self.order[kind, head], *self.numbers[:, kind, head])
                    for kind, counts in enumerate((profile.k, profile.v))
                ),
            )
            for head, profile in enumerate(self.profiles)
        )

    def to(self, device: torch.device) -> "LayerChannels":
        """On another device."""
        return LayerChannels(self.profiles, self.order.to(device), self.numbers.to(device))


def layer_channels(
    k_bits: npt.NDArray[np.uint8],
    v_bits: npt.NDArray[np.uint8],
    statistics: Mapping[str, npt.NDArray[np.float16]] | None = None,
) -> LayerChannels:
    """The channels of a layer's heads, on the host.

    Args:
        k_bits: `[num_kv_heads, head_dim]`, of `CLASSES` or 0.
        v_bits: like `k_bits`.
        statistics: `k_mean`, `k_scale`, `v_mean` and `v_scale`, each like `k_bits`. None: channels
            that are not stored are read as 0, and there are no codes.
    """
    bits = np.stack((k_bits, v_bits))
    order = np.argsort(-bits.astype(np.int64), axis=-1, kind="stable")
    numbers = np.zeros((3, *bits.shape), np.float32)
    if statistics is not None:
        mean = np.stack([statistics[f"{kind}_mean"] for kind in KINDS]).astype(np.float32)
        scale = np.stack([statistics[f"{kind}_scale"] for kind in KINDS]).astype(np.float32)
        step = np.zeros(bits.shape, np.float32)
        for kind, size in STEPS.items():
            step[bits == kind] = size
        factor = step * scale
        inverse = np.divide(np.float32(1), factor, out=np.zeros_like(factor), where=factor > 0)
        numbers = np.stack((mean, factor, inverse))
        numbers = np.take_along_axis(numbers, order[None], axis=-1)
    profiles = tuple(Profile(*_counts(k), *_counts(v)) for k, v in zip(k_bits, v_bits, strict=True))
    return LayerChannels(profiles, torch.from_numpy(order), torch.from_numpy(numbers))


def first_channels(layout: CacheLayout) -> LayerChannels:
    """Channels of heads of which nothing but the layout is known: the first ones are stored."""
    shape = 2, len(layout.profiles), layout.head_dim
    order = torch.arange(layout.head_dim).expand(shape).contiguous()
    # vLLM loads models with another default dtype.
    numbers = torch.zeros((3, *shape), dtype=torch.float32)
    return LayerChannels(layout.profiles, order, numbers)


def _counts(bits: npt.NDArray[np.uint8]) -> Sequence[int]:
    return [int((bits == kind).sum()) for kind in CLASSES]
