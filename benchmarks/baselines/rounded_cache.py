"""Attention over a KV cache that rounds what it stores: how other caches are simulated.

Prompts are read with full attention, over K and V as they are. That is kind to caches of vLLM,
which read prompts from the rounded cache, too.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from vllm_leank.kernels.sinks import sinks_of_rows, softmax

from baselines.once_per_prompt import OncePerPrompt
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


@dataclass(frozen=True)
class Ends:
    """How far queries read what is stored: all of them up to `first`, the last one up to `last`;
    between, where `stored`, bool `[T, last - first]`.
    """

    first: int
    last: int
    stored: torch.Tensor

    @classmethod
    def of(cls, ends: torch.Tensor, device: torch.device) -> "Ends":
        """Of those of each query, int `[T]`, which ascend."""
        first, last = int(ends[0]), int(ends[-1])
        return cls(first, last, (torch.arange(first, last) < ends[:, None]).to(device))


@dataclass
class CacheHook:
    """An attention hook under which queries read what a cache has rounded.

    With `once` everything is rounded once, however many tokens follow it: for answers that are
    computed token by token. `forget` it before the next prompt.
    """

    cache: RoundedCache
    once: bool = False

    def __post_init__(self) -> None:
        self._kept = OncePerPrompt(lambda layer, first, *both: self.cache.round(layer, *both))

    def forget(self) -> None:
        """Begin another prompt."""
        self._kept.forget()

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
        S, H = key.shape[2], key.shape[1]
        group = num_heads // H
        of_key, of_value, hidden = _what_is_read(self.cache, S, T, key.device)
        known = S - T  # tokens behind may be guesses
        stored_key, stored_value = self._stored(
            layer, key, value, known, max(of_key.last, of_value.last)
        )
        rows = query.reshape(B, H, -1, D).float() * (D**-0.5 if scaling is None else scaling)

        first, last = of_key.first, of_key.last
        scores = rows @ key[:, :, first:].float().mT
        if first < last:
            stored = rows @ stored_key[:, :, first:last].mT
            own = of_key.stored.repeat(group, 1)
            scores[..., : last - first] = stored.where(own, scores[..., : last - first])
        scores.masked_fill_(hidden.repeat(group, 1), float("-inf"))
        scores = torch.cat([rows @ stored_key[:, :, :first].mT, scores], dim=-1)
        weights = softmax(scores, sinks_of_rows(sink_scores, H, T))

        first, last = of_value.first, of_value.last
        output = weights[..., :first] @ stored_value[:, :, :first]
        output += weights[..., first:] @ value[:, :, first:].float()
        if first < last:
            change = stored_value[:, :, first:last] - value[:, :, first:last]
            output += (weights[..., first:last] * of_value.stored.repeat(group, 1)) @ change
        return output.view(B, num_heads, T, D).transpose(1, 2).to(query.dtype)

    def _stored(
        self, layer: int, key: torch.Tensor, value: torch.Tensor, known: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as stored, fp32, at least up to `last`; the sink's as they were. What is rounded
        together with tokens behind `known` is not kept.
        """
        cache, end = self.cache, self.cache.sink
        parts = [(key[:, :, :end].float(), value[:, :, :end].float())]
        whole = max(known - end, 0)
        whole -= whole % max(cache.residual, 1)
        if self.once and whole:
            end += whole
            before = slice(cache.sink, end)
            parts.append(self._kept(layer, cache.sink, key[:, :, before], value[:, :, before]))
        if end < last:
            parts.append(cache.round(layer, key[:, :, end:], value[:, :, end:]))
        stored_key, stored_value = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        return stored_key, stored_value


@lru_cache(maxsize=1)
def _what_is_read(
    cache: RoundedCache, S: int, T: int, device: torch.device
) -> tuple[Ends, Ends, torch.Tensor]:
    """For the last T of S tokens, alike in all layers: what is read as stored of K and of V, and
    which keys behind the first of K are hidden, bool `[T, keys]`.
    """
    at = torch.arange(S - T, S)
    # The sink's tokens are stored as they are, so it makes no difference how they are read.
    of_key, of_value = (
        Ends.of(ends.minimum(at + 1).clamp(min=0), device) for ends in cache.rounded(at)
    )
    hidden = torch.arange(of_key.first, S) > at[:, None]
    return of_key, of_value, hidden.to(device)
