"""Runs a function of ours inside every full-attention layer of a transformers model.

Those layers are numbered from 0, as masks number them; sliding layers stay what they are. Models
that go through transformers' `AttentionInterface` hand q, K and V over after RoPE, whatever their
own code looks like, so one hook serves them all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.layers import loses_states
from vllm_leank.errors import UserError
from vllm_leank.offline.plain_attention import plain_attention

_NAME, _NAME_WITHOUT_MASK = "leank_hook", "leank_hook_without_mask"

# Arguments by which models ask for another attention than plain causal softmax(qK)V.
_REFUSED = {
    "softcap": "a cap on attention logits",
    "position_bias": "a position bias",
}


class AttentionHook(Protocol):
    """What runs in each attention layer.

    `query` is `[B, num_heads, Tq, D]`, `key` and `value` `[B, num_kv_heads, Tk, D]`, q and K after
    RoPE, with the keys of the model's cache before the new ones. `attention_mask` is the mask that
    sdpa would get (None: causal), and `sink_scores` `[num_heads]` are the layer's attention sinks
    (None: it has none). The result is the attention output `[B, Tq, num_heads, D]`, or None to
    leave the computation to the model's own attention.
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
    ) -> torch.Tensor | None:
        """Run in layer `layer`."""


class KnowsContext(Protocol):
    """Has K and V of the tokens before those that a model is given."""

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
        """Attention of the model's layer `layer` over the last `window` tokens; as a hook's."""


@dataclass(frozen=True)
class _Active:
    """A hook, the numbers of the model's layers that it serves, and what knows their context."""

    hook: AttentionHook
    numbers: dict[int, int]
    context: KnowsContext | None


_active: list[_Active] = []


@contextmanager
def hooked_attention(
    model: PreTrainedModel, hook: AttentionHook, *, context: KnowsContext | None = None
) -> Iterator[None]:
    """Within the context, every full-attention layer of `model` calls `hook`.

    A hook for tokens that stand behind a `context` computes attention itself, over rows without
    padding, and the context does so in sliding layers. They need no `attention_mask` and get None,
    which spares what is large for a chunk of a long prompt.

    Raises:
        UserError: the model does not use the interface, none of its layers has full attention, or
            some keep states that leank does not know; while it runs: a layer does another attention
            than its config says.
    """
    if context is not None and loses_states(model.config):
        raise UserError(
            f"{type(model).__name__} has layers that keep states of a kind unknown to leank, which "
            "would be lost between the parts of a prompt"
        )
    layers = Geometry.from_hf_config(model.config).layers
    numbers = {layer: number for number, layer in enumerate(layers)}
    # Of what has no mask function, transformers takes that it needs no mask.
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    name = _NAME if context is None else _NAME_WITHOUT_MASK
    AttentionInterface.register(name, _attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise UserError(
            f"{type(model).__name__} does not use transformers' AttentionInterface, "
            "so its attention can be neither observed nor changed"
        )
    _active.append(_Active(hook, numbers, context))
    try:
        yield
    finally:
        _active.pop()
        model.set_attn_implementation(before)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise UserError(f"the model uses {what}, which LeanK does not support")
    if key.shape[-1] != value.shape[-1]:
        raise UserError(
            f"keys have {key.shape[-1]} channels and values {value.shape[-1]} (latent attention?); "
            "LeanK needs equal head sizes"
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    active, window = _active[-1], kwargs.get("sliding_window")
    if (layer in active.numbers) != (window is None):
        raise UserError(f"attention layer {layer} is of another kind than the model's config says")
    if window is None:
        number = active.numbers[layer]
        output = active.hook(number, query, key, value, attention_mask, scaling, s_aux)
        if output is not None:
            return output, None
    elif active.context is not None:
        return active.context.slide(layer, query, key, value, window, scaling, s_aux), None
    if s_aux is not None:
        return plain_attention(query, key, value, attention_mask, scaling, s_aux), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
