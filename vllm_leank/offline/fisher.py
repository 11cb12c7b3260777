"""How much a model's answers depend on its far K and V.

A small error e in K or V of a far token moves the model's next-token distribution by about
`g^2 e^2 / 2` nats, where `g^2` is the expected squared gradient of the log probability of tokens
drawn from that distribution (the diagonal of the Fisher information). No labels are needed, and one
backward pass through the last tokens of a prompt gives the gradients of all channels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import transformers

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.offline.attention_hook import AttentionHook, hooked_attention
from vllm_leank.offline.context import Context, logits, read_prompt
from vllm_leank.offline.far_attention import far_attention
from vllm_leank.offline.progress import reading

QUERIES = 160
"""Tokens at a prompt's end whose distributions are looked at."""

DRAWS = 2
"""How often labels are drawn for them."""

_Ids = TypeVar("_Ids", bound=Sequence[int])

Observe = Callable[[int, int, torch.Tensor, torch.Tensor], None]
"""Takes layer, first position, K and V `[1, H, T, D]` of far tokens."""

Add = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""What is summed up of far K or V `[H, T, D]` and its gradients."""


@dataclass
class FarSums(AttentionHook):
    """A hook under which attention is full, and which adds up something of gradients, by layer.

    Attributes:
        context: K and V of the prompt.
        window: which tokens are far.
        places: those that are far for all queries.
        sums: what was added up so far.
    """

    context: Context
    window: Window
    places: range
    sums: dict[int, list[torch.Tensor]] = field(default_factory=dict)


@dataclass
class FarSquares(FarSums):
    """An attention hook that adds up the squares of the gradients of far K and V, per channel.

    A layer's gradients are dropped as soon as they are added, so only one layer's exist at a time.
    """

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
        """Full causal attention of the new queries, over far K and V that get gradients."""
        sums = self.sums[layer] = []
        keys = self._parts(self.context.key(layer), sums, partial(self.of_key, layer))
        values = self._parts(self.context.value(layer), sums, partial(self.of_value, layer))
        return far_attention(
            query,
            [*keys, key],
            [*values, value],
            self.window,
            scaling=scaling,
            sink_scores=sink_scores,
        ).contiguous()

    def _parts(self, whole: torch.Tensor, sums: list[torch.Tensor], add: Add) -> list[torch.Tensor]:
        """`whole` in three parts, of which the middle one is far."""
        start, stop = self.places.start, self.places.stop
        far = whole[:, :, start:stop].detach().requires_grad_()
        place = len(sums)
        sums.append(torch.zeros((), device=far.device))

        def take(leaf: torch.Tensor) -> None:
            assert leaf.grad is not None
            sums[place] = sums[place] + add(leaf.detach()[0], leaf.grad[0].float())
            leaf.grad = None

        far.register_post_accumulate_grad_hook(take)
        return [whole[:, :, :start], far, whole[:, :, stop:]]

    def of_key(self, layer: int, far: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """What is summed up `[..., H, D]` of a layer's far K `[H, T, D]` and its gradients."""
        return gradient.square().sum(dim=1)

    def of_value(self, layer: int, far: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The same of V's."""
        return gradient.square().sum(dim=1)


def far_gradients(
    model: transformers.PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    window: Window,
    kind: Callable[[Context, Window, range], FarSums] = FarSquares,
    *,
    queries: int = QUERIES,
    draws: int = DRAWS,
    chunk: int = 4096,
    seed: int = 0,
    what: str = "what each channel costs",
) -> Iterator[FarSums]:
    """What `kind` sums up of gradients, by default of far K and V, over prompts of token ids, one
    by one; freezes the model's weights.

    All but the last `queries` tokens of a prompt are read with full attention, `chunk` at a time.
    Far are the tokens that are far for each of the last ones. Prompts without any are passed over.
    Progress is shown as that of `what`.

    Raises:
        UserError: no prompt has far tokens, or the model has no plain causal attention behind
            transformers' AttentionInterface.
    """
    read = _read(model, prompts, window, queries, chunk, what)
    for number, (context, places, rest) in enumerate(read):
        squares = kind(context, window, places)
        _draw(model, squares, rest, draws, [seed, number])
        yield squares


def observe_far(
    model: transformers.PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    window: Window,
    observe: Observe,
    *,
    queries: int = QUERIES,
    chunk: int = 4096,
) -> None:
    """Show `observe` the far K and V of prompts of token ids, the same as `far_gradients` takes.

    Raises:
        UserError: as there.
    """
    for context, places, _ in _read(model, prompts, window, queries, chunk, "means and scales"):
        far = slice(places.start, places.stop)
        for layer in range(len(context.geometry.layers)):
            key, value = context.key(layer), context.value(layer)
            observe(layer, places.start, key[:, :, far], value[:, :, far])


def _read(
    model: transformers.PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    window: Window,
    queries: int,
    chunk: int,
    what: str,
) -> Iterator[tuple[Context, range, Sequence[int]]]:
    """Prompts, read up to their last `queries` tokens, with what is far and these tokens."""
    model.requires_grad_(False).eval()
    context = Context(Geometry.from_hf_config(model.config))
    for ids in reading(far_prompts(prompts, window, queries), what):
        read_prompt(model, context, ids[:-queries], chunk)
        yield context, _far(window, context.length), ids[-queries:]


def draw_labels(scores: torch.Tensor, seed: Sequence[int], draw: int) -> torch.Tensor:
    """Tokens `[T]` by logits `scores` `[T, vocabulary]`, the same for equal seeds.

    They are drawn on the CPU, as another device has other random numbers.
    """
    rng = np.random.default_rng([*seed, draw])
    rolls = torch.from_numpy(rng.random(len(scores)))[:, None]
    steps = scores.softmax(-1).cumsum(-1).double().cpu()
    labels = torch.searchsorted(steps, rolls * steps[:, -1:], right=True)[:, 0]
    return labels.clamp(max=scores.shape[-1] - 1).to(scores.device)


def _draw(
    model: transformers.PreTrainedModel,
    squares: FarSums,
    ids: Sequence[int],
    draws: int,
    seed: Sequence[int],
) -> None:
    """Run the last tokens of a prompt and go back from drawn labels."""
    with hooked_attention(model, squares, context=squares.context):
        scores = logits(model, squares.context, ids).float()
        for draw in range(draws):
            labels = draw_labels(scores.detach(), seed, draw)
            loss = torch.nn.functional.cross_entropy(scores, labels, reduction="sum")
            loss.backward(retain_graph=draw + 1 < draws)


def far_prompts(prompts: Sequence[_Ids], window: Window, queries: int = QUERIES) -> list[_Ids]:
    """The prompts that have tokens which are far for all of their last `queries`.

    Raises:
        UserError: there are none.
    """
    far = [ids for ids in prompts if _far(window, len(ids) - queries)]
    if not far:
        raise UserError(
            f"no prompt has far tokens for its last {queries} tokens; give longer prompts, or a "
            "smaller sink or recent"
        )
    return far


def _far(window: Window, length: int) -> range:
    """Tokens that are far for every query from position `length` on."""
    return range(window.sink, window.boundary(max(length, 0) + 1))
