"""Attention over a KV cache that rounds what it stores: how other caches are simulated.

Prompts are read with full attention, over K and V as they are. That is kind to caches of vLLM,
which read prompts from the rounded cache, too.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm_leank.kernels.sinks import sinks_of_rows, softmax

from vllm_leank.core.geometry import Geometry

MODEL_BYTES = 2
"""Bytes of an element of K or V that is not rounded: bf16."""


class RoundedCache(ABC):
    """A cache for all layers of a model.

    Attributes:
        name: what tables call it.
        sink: first tokens that are never rounded.
        residual: last tokens that are not; 0: every token is rounded, the query's own as well.
    """

    name: str
    sink: ClassVar[int] = 0
    residual: ClassVar[int] = 0

    @abstractmethod
    def layer_bytes(self, geometry: Geometry, layer: int) -> float:
        """Bytes of a rounded token's K and V in one layer, with all scales."""

    @abstractmethod
    def round(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K after RoPE and V `[B, H, T, D]`, as the cache gives them back, in fp32.

        The first token has a multiple of `residual` rounded tokens before it. Where tokens are
        rounded in groups, those behind the last whole group are not read.
        """

    def token_bytes(self, geometry: Geometry) -> float:
        """Bytes of a rounded token over all layers."""
        return sum(self.layer_bytes(geometry, layer) for layer in range(len(geometry.layers)))

    def rounded(self, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First token of K, and of V, that is not rounded for queries at positions `at`.

        With a residual, K is rounded `residual` tokens at a time, when so many have come
        together, and V token by token.
        """
        if not self.residual:
            return at + 1, at + 1
        of_key = self.sink + (at - self.sink).clamp(min=0) // self.residual * self.residual
        return of_key, at - self.residual


@dataclass
class CacheHook:
    """An attention hook under which queries read what a cache has rounded."""

    cache: RoundedCache

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
        sink_scores: torch.Tensor | None,
    ) -> torch.Tensor:
        """Causal attention of the last queries `[B, num_heads, T, D]`, in fp32.

        Keys and values `[B, H, S, D]` are those of all tokens; gives `[B, T, num_heads, D]`.
        """
        B, num_heads, T, D = query.shape
        S, H, sink = key.shape[2], key.shape[1], self.cache.sink
        at_key = torch.arange(S, device=key.device)
        at = torch.arange(S - T, S, device=key.device)
        of_key, of_value = (
            ((at_key >= sink) & (at_key < end[:, None])).repeat(num_heads // H, 1)
            for end in self.cache.rounded(at)
        )  # [group * T, S]
        stored_key, stored_value = self.cache.round(layer, key[:, :, sink:], value[:, :, sink:])
        stored_key = torch.cat([key[:, :, :sink].float(), stored_key], dim=2)
        stored_value = torch.cat([value[:, :, :sink].float(), stored_value], dim=2)
        rows = query.reshape(B, H, -1, D).float() * (D**-0.5 if scaling is None else scaling)
        scores = torch.where(of_key, rows @ stored_key.mT, rows @ key.float().mT)
        hidden = (at_key > at[:, None]).repeat(num_heads // H, 1)
        sinks = sinks_of_rows(sink_scores, H, T)
        weights = softmax(scores.masked_fill(hidden, float("-inf")), sinks)
        output = (weights * of_value) @ stored_value + (weights * ~of_value) @ value.float()
        return output.view(B, num_heads, T, D).transpose(1, 2).to(query.dtype)
