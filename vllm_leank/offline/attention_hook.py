"""Runs a function of ours inside every attention layer of a transformers model.

Models that go through transformers' `AttentionInterface` hand q, K and V over after RoPE, whatever
their own code looks like, so one hook serves them all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vllm_leank.errors import UserError

_NAME, _NAME_WITHOUT_MASK = "leank_hook", "leank_hook_without_mask"

# Arguments by which models ask for another attention than plain causal softmax(qK)V.
_REFUSED = {
    "sliding_window": "sliding-window attention",
    "softcap": "a cap on attention logits",
    "s_aux": "attention sinks as parameters",
    "position_bias": "a position bias",
}


class AttentionHook(Protocol):
    """What runs in each attention layer.

    `query` is `[B, num_heads, Tq, D]`, `key` and `value` `[B, num_kv_heads, Tk, D]`, q and K after
    RoPE, with the keys of the model's cache before the new ones. `attention_mask` is the mask that
    sdpa would get (None: causal). The result is the attention output `[B, Tq, num_heads, D]`, or
    None to leave the computation to sdpa.
    """

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
    ) -> torch.Tensor | None:
        """Run in layer `layer`."""


_active: list[AttentionHook] = []


@contextmanager
def hooked_attention(
    model: PreTrainedModel, hook: AttentionHook, *, mask: bool = True
) -> Iterator[None]:
    """Within the context, every attention layer of `model` calls `hook`.

    A hook that computes attention itself, over rows without padding, needs no `attention_mask`:
    with `mask` False it gets None, and is spared what is large for a chunk of a long prompt.

    Raises:
        UserError: the model does not use the interface; while it runs: a layer does another
            attention than causal attention over all tokens.
    """
    # Of what has no mask function, transformers takes that it needs no mask.
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    name = _NAME if mask else _NAME_WITHOUT_MASK
    AttentionInterface.register(name, _attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise UserError(
            f"{type(model).__name__} does not use transformers' AttentionInterface, "
            "so its attention can be neither observed nor changed"
        )
    _active.append(hook)
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
    output = _active[-1](layer, query, key, value, attention_mask, scaling)
    if output is not None:
        return output, None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
