"""Attention whose queries read the best segments of far tokens alone, by several ways to choose
them: how the option `pages` is judged, in plain PyTorch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from vllm_leank.kernels.reference_selection import granule_scores, select
from vllm_leank.kernels.sinks import softmax

from baselines.far_tokens import FarLayer
from vllm_leank.core.selection import DENSE_LAYERS, SEGMENT, SHARE_UNITS, Selection
from vllm_leank.core.window import GRANULE, Window
from vllm_leank.offline.context import Context

ALL, LEAD, EXACT, RANDOM = "all", "lead", "exact", "random"

WAYS = LEAD, EXACT, RANDOM
"""By what segments are chosen: as engines do; by how much of full attention's weights they have,
over the group's queries, which is the most that any choice can find; or by chance."""

EVERYTHING = Selection(SHARE_UNITS, 0)

LEAST_MASS = 1e-30
"""Weights below count as this: their logarithms are ranked."""


@dataclass(frozen=True)
class Choice:
    """What a row of a batch reads.

    Attributes:
        way: one of `WAYS`, or `ALL`.
        selection: how many segments.
    """

    way: str
    selection: Selection = EVERYTHING


@dataclass
class Found:
    """Of full attention's weights, sums over tokens, layers that select, and heads that see far
    tokens.

    Attributes:
        found: of each row, the share of the far tokens' weights that its choice has, `[rows]`.
        lost: of each row, the weights of far tokens that are not read, `[rows]`.
        count: of how many it is the sum.
    """

    found: torch.Tensor
    lost: torch.Tensor
    count: torch.Tensor

    def means(self) -> list[tuple[float, float]]:
        """Of each row, the share found and the weights lost."""
        both = torch.stack((self.found, self.lost), -1) / self.count.clamp_min(1)
        return [(found, lost) for found, lost in both.tolist()]


class _OfRows:
    """Choices of a batch's rows as tensors.

    Attributes:
        exact: rows that choose by exact weights, bool `[V, 1, 1]`.
        random: rows that choose by chance, like `exact`.
        selection: how many segments each row reads.
    """

    def __init__(self, choices: Sequence[Choice], device: torch.device):
        self.exact, self.random = (
            torch.tensor([one.way == way for one in choices], device=device)[:, None, None]
            for way in (EXACT, RANDOM)
        )
        numbers = [(one.selection.share, one.selection.least) for one in choices]
        # It counts segments in tensors, and so its own numbers may be tensors, too: `[V, 1]`.
        self.selection = Selection(*torch.tensor(numbers, device=device)[:, None].unbind(-1))


class SelectedReading:
    """An attention hook for a batch whose rows continue one prompt, each with a choice of its own.

    Keys of tokens behind the prompt are kept from call to call, so that answers can be decoded.
    Every query chooses for itself, as where an engine decodes it.

    Args:
        context: the prompt's K and V.
        window: which tokens are far.
        far: the prompt's far tokens by layer.
        choices: one for each row.
        seed: of choices by chance.
    """

    def __init__(
        self,
        context: Context,
        window: Window,
        far: Callable[[int], FarLayer],
        choices: Sequence[Choice],
        seed: int = 0,
    ):
        self.choices = choices
        self._context, self._window, self._far, self._seed = context, window, far, seed
        self._new: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._found: Found | None = None
        self._rows: _OfRows | None = None

    @property
    def found(self) -> Found:
        """What the choices have found so far.

        Raises:
            ValueError: nothing was chosen: the prompt has no far tokens, or the model few layers.
        """
        if self._found is None:
            raise ValueError("no query has chosen far tokens yet")
        return self._found

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
        """Attention of new tokens `[V, num_heads, T, D]`, in fp32: `[V, T, num_heads, D]`.

        Raises:
            ValueError: more tokens follow the prompt than stay dense.
        """
        V, num_heads, T, D = query.shape
        H, P, sink = key.shape[1], self._context.length, self._window.sink
        if layer in self._new:
            before = self._new[layer]
            key, value = (torch.cat(parts, 2) for parts in zip(before, (key, value), strict=True))
        self._new[layer] = key, value
        new_key, new_value = key.transpose(0, 1).float(), value.transpose(0, 1).float()
        of_key, of_value = (
            self._context.key(layer)[0].float(),
            self._context.value(layer)[0].float(),
        )
        length = P + key.shape[2]
        at = torch.arange(length - T, length, device=query.device)
        end = self._window.boundary(length)
        if end > P:
            raise ValueError(f"{length - P} tokens follow the prompt, more than stay dense")

        rows = query.view(V, H, -1, T, D).transpose(0, 1).float()  # [H, V, group, T, D]
        rows = rows * (D**-0.5 if scaling is None else scaling)
        flat = rows.flatten(1, 3)
        shape = *rows.shape[:-1], -1
        hidden = torch.arange(P, length, device=query.device) > at[:, None]
        of_new = (rows.flatten(2, 3) @ new_key.mT).view(shape).masked_fill(hidden, -torch.inf)
        scores = torch.cat(((flat @ of_key.mT).view(shape), of_new), -1)
        sinks = None if sink_scores is None else sink_scores.view(H, 1, -1, 1, 1)
        weights = softmax(scores, sinks)
        output: torch.Tensor | float = 0.0
        if end > sink:
            far, part = self._far(layer), slice(sink, end)
            starts = torch.arange(sink, end, GRANULE, device=query.device)
            seen = starts < self._window.boundary(at + 1)[:, None]  # [T, granules]
            read = seen.expand(H, V, *seen.shape)
            if layer >= DENSE_LAYERS:
                mass = weights[..., part].unflatten(-1, (-1, GRANULE)).sum(-1).sum(2) * seen
                read = self._chosen(layer, rows, mass, read, far)
                self._count(mass, read, far.blind, num_heads // H, seen.any(-1))
            read = (read & ~far.blind.view(-1, 1, 1, 1)).repeat_interleave(GRANULE, -1).unsqueeze(2)
            is_far = seen.repeat_interleave(GRANULE, -1)
            stored = (flat @ far.key[:, : end - sink].mT).view(shape)
            stored.masked_fill_(~read, -torch.inf)
            scores[..., part] = torch.where(is_far, stored, scores[..., part])
            weights = softmax(scores, sinks)
            of_far = weights[..., part] * is_far
            weights[..., part] *= ~is_far
            output = (of_far.flatten(1, 3) @ far.value[:, : end - sink]).view(shape)
        output = output + (weights[..., :P].flatten(1, 3) @ of_value).view(shape)
        output = output + (weights[..., P:].flatten(2, 3) @ new_value).view(shape)
        return output.transpose(0, 1).reshape(V, num_heads, T, D).transpose(1, 2).to(query.dtype)

    def _chosen(
        self,
        layer: int,
        rows: torch.Tensor,
        mass: torch.Tensor,
        seen: torch.Tensor,
        far: FarLayer,
    ) -> torch.Tensor:
        """Which granules queries read, bool `[H, V, T, granules]`.

        Args:
            layer: theirs.
            rows: queries `[H, V, group, T, D]`, scaled.
            mass: full attention's weights of granules over the group, `[H, V, T, granules]`.
            seen: which granules are far for a query, like `mass`.
            far: the layer's.
        """
        H, V, _, T, _ = rows.shape
        granules = mass.shape[-1]
        sink, device = self._window.sink, mass.device
        segment = (sink % SEGMENT + GRANULE * torch.arange(granules, device=device)) // SEGMENT
        segments = granules // (SEGMENT // GRANULE) + 1
        lead = far.lead[:, : granules * GRANULE]
        scores = granule_scores(rows.flatten(1, 3), lead).view(H, V, -1, T, granules)
        of_segments = mass.new_zeros(H, V, T, segments).index_add_(-1, segment, mass)
        by_mass = of_segments.clamp_min(LEAST_MASS).log()[..., segment]
        seed = (
            (self._seed << 40) + (layer << 30) + self._context.length + self._new[layer][0].shape[2]
        )
        chance = torch.Generator(device).manual_seed(seed)
        by_chance = torch.rand(H, 1, T, segments, generator=chance, device=device)[..., segment]
        if self._rows is None:
            self._rows = _OfRows(self.choices, device)
        exact, random = self._rows.exact.unsqueeze(1), self._rows.random.unsqueeze(1)
        scores = torch.where(exact, by_mass.unsqueeze(2), scores)
        scores = torch.where(random, by_chance.unsqueeze(2), scores)
        chosen = [
            select(of_head, of_tokens, sink, self._rows.selection)
            for of_head, of_tokens in zip(scores, seen, strict=True)
        ]
        return seen & torch.stack(chosen)

    def _count(
        self,
        mass: torch.Tensor,
        read: torch.Tensor,
        blind: torch.Tensor,
        group: int,
        has_far: torch.Tensor,
    ) -> None:
        """Add what queries of a layer have found; those that have no far tokens do not count."""
        counts = (~blind).view(-1, 1, 1) & has_far  # [H, 1, T]
        all_mass, own = mass.sum(-1), (mass * read).sum(-1)
        found = torch.where(counts, own / all_mass.clamp_min(LEAST_MASS), 0).sum((0, 2))
        lost = torch.where(counts, (all_mass - own) / group, 0).sum((0, 2))
        sums = found.double(), lost.double(), counts.sum()
        if self._found is None:
            self._found = Found(*sums)
        else:
            self._found.found += sums[0]
            self._found.lost += sums[1]
            self._found.count += sums[2]


@dataclass(frozen=True)
class Together:
    """Hooks that each have some rows of a batch, one after the other."""

    hooks: Sequence[SelectedReading]

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
        """As theirs, of all rows."""
        counts = [len(hook.choices) for hook in self.hooks]
        parts = zip(self.hooks, *(one.split(counts) for one in (query, key, value)), strict=True)
        return torch.cat(
            [hook(layer, q, k, v, None, scaling, sink_scores) for hook, q, k, v in parts]
        )
