"""Kinds of a model's layers: which of them leank serves, and what the others keep beside.

A layer with full attention reads every token before it, so its cache grows with the request, and
leank shrinks it. A sliding layer reads the last few, keeps no more, and stays vLLM's; so does one
that keeps a state (`core/states.py`).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_leank.core.hf_config import Get, fields_of, required
from vllm_leank.core.pages import LEAST_BLOCK, pages
from vllm_leank.core.states import STATES, StateLayers, count_states, keeps_states, state_bytes
from vllm_leank.errors import UserError

MAX_LAYERS = 4096
"""More than any model has: what files say is no reason to make longer lists."""

FULL = "full_attention"
SLIDING = "sliding_attention"
HYBRID = "hybrid"
"""Full attention and a state in one layer."""


_ROPE_IN_SLIDING_LAYERS = ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe")
"""Model types that turn keys in sliding layers alone, where they have such layers."""


@dataclass(frozen=True)
class SlidingLayers:
    """Layers that read the last `window` tokens, beside served ones with the same KV heads.

    Their pages have 32 tokens of a layer, however long window pages are.
    """

    count: int
    window: int

    def pages(self, length: int, in_flight: int = 1) -> int:
        """Pages of a layer that a request of `length` tokens holds at most, as vLLM counts them,
        while `in_flight` tokens are computed at once.
        """
        return pages(min(self.window - 1 + in_flight, length), LEAST_BLOCK) + 1


def layer_kinds(config: Any) -> tuple[str, ...]:
    """The kind of each layer of a decoder, by its transformers config.

    Raises:
        UserError: the config contradicts itself.
    """
    get = fields_of(config)
    count, kinds = required(get, "num_hidden_layers"), get("layer_types")
    if type(count) is not int or not 1 <= count <= MAX_LAYERS:
        raise UserError(
            f"the model's config has num_hidden_layers {count}; it must be a whole number from 1 "
            f"to {MAX_LAYERS}"
        )
    if kinds is None or (keeps_states(config) and set(kinds) == {HYBRID}):
        # Without `layer_types` all layers slide, or none does.
        return (SLIDING if window_of(get) else FULL,) * count
    if len(kinds) != count:
        raise UserError(f"the model's config has {count} layers, but layer_types of {len(kinds)}")
    return tuple(FULL if kind == "attention" else str(kind) for kind in kinds)


def sliding_layers(config: Any) -> SlidingLayers | None:
    """The sliding layers of a decoder, None where there are none."""
    count = layer_kinds(config).count(SLIDING)
    return SlidingLayers(count, required(fields_of(config), "sliding_window")) if count else None


def count_state_layers(config: Any) -> int:
    """How many layers of a decoder keep states.

    Raises:
        UserError: the config contradicts itself.
    """
    return count_states(config, layer_kinds(config))


def loses_states(config: Any) -> bool:
    """Whether layers of a decoder keep states, and leank does not know how."""
    return not keeps_states(config) and any(kind in STATES for kind in layer_kinds(config))


def state_layers(config: Any, itemsize: int, tp_size: int) -> StateLayers | None:
    """The layers of a decoder that keep states, for a model of numbers of `itemsize` bytes; None
    where there are none.
    """
    count = count_state_layers(config)
    return StateLayers(count, state_bytes(config, itemsize, tp_size)) if count else None


def full_layers(kinds: Sequence[str]) -> tuple[int, ...]:
    """Layers with full attention."""
    return tuple(layer for layer, kind in enumerate(kinds) if kind == FULL)


def layers_without_rope(config: Any) -> tuple[int, ...]:
    """Layers with full attention that do not turn q and K, of a model that does in others."""
    get, kinds = fields_of(config), layer_kinds(config)
    layers = full_layers(kinds)
    if get("model_type") in _ROPE_IN_SLIDING_LAYERS and SLIDING in kinds:
        # Cohere2 MoE turns in its first layers, too, those without experts.
        turned = get("prefix_dense_sliding_window_pattern") == 1 and get("mlp_layer_types")
        return tuple(layer for layer in layers if not turned or turned[layer] != "dense")
    if get("model_type") == "nemotron_h":
        return layers
    if get("model_type") == "granitemoehybrid":
        return () if get("position_embedding_type") == "rope" else layers
    # A number for each layer, and 0 where nothing turns: a flag, or theta.
    turns = get("no_rope_layers") or get("layer_rope_theta")
    return tuple(layer for layer in layers if turns and not turns[layer])


def describe_layers(kinds: Sequence[str]) -> str:
    """How many layers of each kind there are, in words."""
    counts = Counter(map(describe_kind, kinds))
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def describe_kind(kind: str) -> str:
    """A kind of layers, in words."""
    return kind.removesuffix("_attention").replace("_", " ")


def window_of(get: Get) -> int | None:
    """Tokens that sliding layers read, None where the config switches them off or has none."""
    return None if get("use_sliding_window") is False else get("sliding_window")
