"""Which models leank serves: one judge for startup and for every command.

Both know a model by what its config says. `serving/checks.py` asks vLLM for it, `Attention.of`
reads it without vLLM.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_leank.core.hf_config import fields_of, head_size, kv_heads, layer_fields
from vllm_leank.core.layers import (
    FULL,
    SLIDING,
    describe_kind,
    describe_layers,
    layer_kinds,
    window_of,
)
from vllm_leank.core.pages import MAX_HEAD_DIM
from vllm_leank.core.states import STATELESS, STATES, count_states, keeps_states
from vllm_leank.errors import UserError

OTHER = "use another model"

_STATE_SPACE = (
    "bailing_hybrid",
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "mamba",
    "nemotron_h",
    "olmo_hybrid",
    "plamo2",
    "qwen3_5",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "xlstm",
    "zamba",
)
"""Beginnings of model types whose layers are not all attention, unless their configs say so.
Those of them that are served are in `core/states.py`.
"""

_STATE_SPACE_ARCHITECTURES = (
    "BailingMoeV2_5ForCausalLM",
    "BailingMoeV3ForCausalLM",
    "NemotronHPuzzleForCausalLM",
)
"""The same, whose model types are in no version of transformers."""

_ALIBI = ("bloom", "mpt")
"""Model types whose positions are biases."""

_LATENT = ("kv_lora_rank", "compress_ratios", "compress_rates")
"""Fields of configs with latent attention: of DeepSeek up to V3.2 and of V4."""

_ENCODERS = ("bert", "roberta", "electra", "xlm-roberta", "modernbert", "nomic_bert", "vit", "clip")

NOT_IN_CONFIGS = {
    "IQuestLoopCoderForCausalLM": "layers that share their K and V are not supported",
    "HrmTextForCausalLM": "prompts that are read both ways (prefix LM) are not supported",
    "Step1ForCausalLM": "ALiBi is not supported",
}
"""What architectures have that their configs do not show."""


@dataclass(frozen=True)
class Attention:
    """What a model's attention has.

    Attributes:
        head_size: channels of a head.
        is_encoder: it does not generate text.
        is_encoder_decoder: it has cross attention.
        is_diffusion: it does not generate one token after the other.
        is_latent: multi-head latent attention (MLA).
        is_state_space: some layers are no attention, and leank does not know their states.
        layers: what is wrong with its layers, a sentence part each: `layer_reasons`.
        unshown: what is wrong with its architecture, the same: of `NOT_IN_CONFIGS`.
        has_soft_cap: logits are capped.
        has_alibi: positions are biases.
        sees_images_both_ways: attention over images is bidirectional.
    """

    head_size: int
    is_encoder: bool = False
    is_encoder_decoder: bool = False
    is_diffusion: bool = False
    is_latent: bool = False
    is_state_space: bool = False
    layers: tuple[str, ...] = ()
    unshown: tuple[str, ...] = ()
    has_soft_cap: bool = False
    has_alibi: bool = False
    sees_images_both_ways: bool = False

    @classmethod
    def of(cls, config: Any) -> "Attention":
        """The attention of a model's text part, from a transformers config or a `config.json`."""
        get = fields_of(config)
        kind, architectures = str(get("model_type") or ""), tuple(get("architectures") or ())
        told = cls(
            _served_head_size(config),
            is_encoder=kind in _ENCODERS,
            is_encoder_decoder=bool(get("is_encoder_decoder")),
            is_latent=is_latent(config),
            is_state_space=_is_state_space(config, architectures),
            unshown=unshown(architectures),
            has_soft_cap=bool(get("attn_logit_softcapping")),
            has_alibi=bool(get("alibi")) or kind in _ALIBI,
        )
        if any((told.is_encoder, told.is_encoder_decoder, told.is_latent, told.is_state_space)):
            return told  # their layers are counted in other ways
        return replace(told, layers=tuple(layer_reasons(config, window_of(get))))

    def refusals(self, other: str = OTHER) -> Iterator[str]:
        """What of it cannot be served; `other` says what to do instead."""
        if self.is_encoder:
            yield f"only text generation is supported; {other}"
            return
        if self.is_encoder_decoder:
            yield f"cross and encoder attention are not supported; {other}"
            return
        if self.is_diffusion:
            yield f"diffusion language models are not supported; {other}"
            return
        if self.is_latent:
            yield f"multi-head latent attention (MLA) is not supported; {other}"
            return
        if self.is_state_space:
            yield f"state-space and linear-attention layers are not supported; {other}"
            return
        yield from (f"{reason}; {other}" for reason in (*self.unshown, *self.layers))
        if self.has_soft_cap:
            yield f"a logits soft cap is not supported, as no kernel here has one; {other}"
        if self.has_alibi:
            yield f"ALiBi is not supported; {other}"
        if self.sees_images_both_ways:
            yield (
                "bidirectional attention over images is not supported: serve text alone, with "
                "--language-model-only"
            )
        # Configs that do not tell are refused for what they lack.
        if self.head_size % 32 or self.head_size > MAX_HEAD_DIM:
            yield (
                f"head size {self.head_size} is not a multiple of 32 up to {MAX_HEAD_DIM}, for "
                f"which kernels are made; {other}"
            )


def unshown(architectures: Iterable[str]) -> tuple[str, ...]:
    """What these have that their configs do not show, and that cannot be served."""
    return tuple(NOT_IN_CONFIGS[one] for one in architectures if one in NOT_IN_CONFIGS)


def is_latent(config: Any) -> bool:
    """Whether attention goes through a latent; some models keep full heads of it all the same."""
    get = fields_of(config)
    return any(get(name) is not None for name in _LATENT)


def layer_reasons(config: Any, window: int | None) -> Iterator[str]:
    """What a model's layers are that cannot be served, or cannot be served beside each other.

    `window` is the tokens that sliding layers read.
    """
    get = fields_of(config)
    try:
        kinds = layer_kinds(config)
    except UserError as error:
        yield str(error)
        return
    known = {FULL, SLIDING, *STATES, *STATELESS} if keeps_states(config) else {FULL, SLIDING}
    if others := sorted(set(kinds) - known):
        yield f"layers with {', '.join(others)} are not supported"
    elif states := count_states(config, kinds):
        if FULL not in kinds:
            yield "no layer has full attention, so nothing grows with the context"
        if SLIDING in kinds or window:
            yield f"sliding layers beside {states} that keep states are not supported"
    elif FULL not in kinds or (SLIDING not in kinds and window):
        yield (
            f"sliding-window attention in all of its {len(kinds)} layers keeps nothing that leank "
            "could prune"
        )
    elif SLIDING in kinds and not window:
        yield (
            f"{describe_layers(kinds)} layers without a sliding_window are not supported: remove "
            "--disable-sliding-window, if it is given"
        )
    if get("num_kv_shared_layers"):
        yield "layers that share their K and V are not supported"
    yield from _head_reasons(config, kinds)


def _head_reasons(config: Any, kinds: Sequence[str]) -> Iterator[str]:
    """What is wrong with heads that differ from layer to layer, or K from V."""
    get = fields_of(config)
    sizes = _head_sizes(config, kinds)
    if set(sizes) != {head_size(get)}:
        yield (
            f"heads of {_by_kind(sizes, kinds)} are not supported, as pages of all layers have one "
            "size"
        )
    counts = _kv_head_counts(config, kinds)
    if set(counts) != {kv_heads(get)}:
        yield (
            f"KV heads, {_by_kind(counts, kinds)}, are not supported, as pages of all layers have "
            "one size"
        )
    if get("v_head_dim") not in (None, *sizes):
        yield f"heads with {sizes[0]} channels of K and {get('v_head_dim')} of V are not supported"


def _head_sizes(config: Any, kinds: Sequence[str]) -> list[int]:
    """Channels of heads in each layer."""
    own = fields_of(config)("global_head_dim")
    return [
        own if own and kind == FULL else head_size(layer_fields(config, layer))
        for layer, kind in enumerate(kinds)
    ]


def _kv_head_counts(config: Any, kinds: Sequence[str]) -> list[int]:
    """KV heads of each layer."""
    own = fields_of(config)("num_global_key_value_heads")
    return [
        own if own and kind == FULL else kv_heads(layer_fields(config, layer))
        for layer, kind in enumerate(kinds)
    ]


def _by_kind(numbers: Sequence[int], kinds: Sequence[str]) -> str:
    """Numbers of layers and the kinds that have them, in words."""
    found = dict.fromkeys(zip(numbers, kinds, strict=True))
    return " and ".join(f"{number} in {describe_kind(kind)} layers" for number, kind in found)


def _served_head_size(config: Any) -> int:
    """Channels of heads in layers with full attention, or in any where none has that."""
    try:
        kinds = layer_kinds(config)
    except UserError:
        return head_size(fields_of(config))
    sizes = _head_sizes(config, kinds)
    return max([size for size, kind in zip(sizes, kinds, strict=True) if kind == FULL] or sizes)


def _is_state_space(config: Any, architectures: Iterable[str]) -> bool:
    """Whether some layers are no attention, and leank does not know what they keep."""
    if any(one in _STATE_SPACE_ARCHITECTURES for one in architectures):
        return True
    if keeps_states(config):
        return False
    get = fields_of(config)
    kinds = set(get("layer_types") or get("layers_block_type") or ())
    if str(get("model_type") or "").startswith(_STATE_SPACE):
        # Some have the code for such layers, but none of them.
        return not kinds or bool(kinds - {"attention", FULL})
    return get("state_size") is not None or any(
        name in one for one in kinds for name in ("linear", "mamba", "conv")
    )
