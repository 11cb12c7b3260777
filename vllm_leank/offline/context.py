"""K and V of a prompt that was read with full attention, kept outside the model, and the states of
layers that keep such.

What comes after the prompt can then run several times over the same K and V, with another attention
or with gradients, at the cost of its own tokens alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.layers import count_state_layers
from vllm_leank.errors import UserError
from vllm_leank.offline.attention_hook import AttentionHook, hooked_attention
from vllm_leank.offline.plain_attention import plain_attention
from vllm_leank.offline.states import States


@dataclass(frozen=True)
class Mark:
    """How far a prompt was read at some time; `states` are those of then, where layers keep any."""

    length: int
    states: States | None


@dataclass
class Context:
    """An attention hook that computes a prompt in chunks and keeps its K and V, `[1, H, S, D]`, of
    sliding layers as well. Layers are those of hooks, except where they are called the model's.

    Buffers stay from prompt to prompt and grow with the longest.

    Attributes:
        geometry: shape of the model's attention.
        length: tokens of the prompt that are kept.
        states: behind these, of layers that keep states; None before any token.
        ahead: the same behind the tokens that a model was given last.
    """

    geometry: Geometry
    length: int = 0
    states: States | None = None
    ahead: States | None = None
    _keys: dict[int, torch.Tensor] = field(default_factory=dict)
    _values: dict[int, torch.Tensor] = field(default_factory=dict)
    _room: int = 0

    def begin(self, tokens: int) -> None:
        """Forget the last prompt; the next has `tokens` tokens."""
        self.length, self.states = 0, None
        if tokens > self._room:
            self._room = tokens
            self._keys.clear()
            self._values.clear()

    def key(self, layer: int) -> torch.Tensor:
        """K of the whole prompt after RoPE."""
        return self._keys[self.geometry.layers[layer]][:, :, : self.length]

    def value(self, layer: int) -> torch.Tensor:
        """V of the whole prompt."""
        return self._values[self.geometry.layers[layer]][:, :, : self.length]

    def advance(self, tokens: int) -> None:
        """Note that a chunk went through all layers.

        Raises:
            UserError: some layers have no attention that goes through the hook.
        """
        self.length, self.states = self.length + tokens, self.ahead
        if missing := set(self.geometry.layers) - set(self._keys):
            raise UserError(
                f"layers {sorted(missing)} have no attention that goes through transformers' "
                "AttentionInterface, so their K and V cannot be had"
            )

    def mark(self) -> Mark:
        """Where the prompt ends now."""
        return Mark(self.length, self.states)

    def cut(self, mark: Mark) -> None:
        """Forget all tokens behind a mark of this prompt."""
        assert mark.length <= self.length
        self.length, self.states = mark.length, mark.states

    def put(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write K and V `[1, H, T, D]` of tokens behind the context's, of the model's layer
        `layer`; K and V of all, as views.

        They belong to the context once `advance` says so; until then others may be written there.

        Raises:
            UserError: their shape is not what the model's config says.
        """
        H, D = self.geometry.num_kv_heads, self.geometry.head_dim
        if layer >= self.geometry.num_layers or (key.shape[1], key.shape[3]) != (H, D):
            raise UserError(
                f"attention layer {layer} has {key.shape[1]} KV heads of {key.shape[3]}, "
                f"unlike the model's config ({self.geometry})"
            )
        end = self.length + key.shape[2]
        for store, new in ((self._keys, key), (self._values, value)):
            old = store.get(layer)
            if old is None or old.shape[2] < end:
                store[layer] = new.new_empty(1, H, max(end, self._room), D)
                if old is not None:
                    store[layer][:, :, : self.length] = old[:, :, : self.length]
            store[layer][:, :, self.length : end] = new
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

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
        """Full causal attention of the chunk's queries over everything up to them."""
        keys, values = self.put(self.geometry.layers[layer], key, value)
        return plain_attention(query, keys, values, None, scaling, sink_scores)

    def slide(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int,
        scaling: float | None,
        sink_scores: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of the chunk's queries over the last `window` tokens up to each, in the model's
        layer `layer`. Gradients reach the chunk's K and V.
        """
        self.put(layer, key.detach(), value.detach())
        before = slice(max(0, self.length - window + 1), self.length)
        keys = torch.cat([self._keys[layer][:, :, before], key], dim=2)
        values = torch.cat([self._values[layer][:, :, before], value], dim=2)
        T, S = query.shape[2], keys.shape[2]
        at_key = torch.arange(S, device=query.device)
        age = at_key[S - T :, None] - at_key
        seen = (age >= 0) & (age < window)
        return plain_attention(query, keys, values, seen, scaling, sink_scores)


@torch.no_grad()
def read_prompt(
    model: transformers.PreTrainedModel, context: Context, prompt: Sequence[int], chunk: int
) -> None:
    """Fill the context with K and V of a prompt, computed `chunk` tokens at a time.

    Raises:
        UserError: the model has no plain causal attention behind transformers' AttentionInterface.
    """
    context.begin(len(prompt))
    with hooked_attention(model, context, context=context):
        for at in range(0, len(prompt), chunk):
            tokens = prompt[at : at + chunk]
            hidden_states(model, context, tokens)
            context.advance(len(tokens))


def hidden_states(
    model: transformers.PreTrainedModel, context: Context, ids: Sequence[int]
) -> torch.Tensor:
    """Final hidden states `[1, T, hidden]` of tokens that stand right after the context.

    The decoder runs without its head, and without a cache of K and V, which hooks keep themselves.
    """
    return model.base_model(**_inputs(model, context, ids)).last_hidden_state


def logits(
    model: transformers.PreTrainedModel, context: Context, ids: Sequence[int]
) -> torch.Tensor:
    """Logits `[T, vocabulary]` of tokens that stand right after the context."""
    return model(**_inputs(model, context, ids)).logits[0]


def _inputs(
    model: transformers.PreTrainedModel, context: Context, ids: Sequence[int]
) -> dict[str, Any]:
    """Arguments of a model for tokens that stand right after the context."""
    first = context.length
    inputs = {
        "input_ids": torch.tensor([list(ids)], device=model.device),
        "position_ids": torch.arange(first, first + len(ids), device=model.device)[None],
        "use_cache": False,
    }
    if count_state_layers(model.config):
        before = context.states or States(context.geometry.num_layers)
        context.ahead = before.copy()
        inputs |= {"past_key_values": context.ahead, "use_cache": True}
    return inputs


@dataclass(frozen=True)
class AfterContext:
    """An attention hook that gives `hook` the context's K and V before the new ones.

    The new ones stand in the context's memory, so no gradients reach them.
    """

    context: Context
    hook: AttentionHook

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
        sink_scores: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Attention of tokens that stand right after the context."""
        keys, values = self.context.put(self.context.geometry.layers[layer], key, value)
        return self.hook(layer, query, keys, values, attention_mask, scaling, sink_scores)


@torch.no_grad()
def logits_after(
    model: transformers.PreTrainedModel, context: Context, ids: Sequence[int], hook: AttentionHook
) -> torch.Tensor:
    """As `logits`, under `hook`, which gets K and V of all tokens; the context stays as it is."""
    with hooked_attention(model, AfterContext(context, hook), context=context):
        return logits(model, context, ids)
