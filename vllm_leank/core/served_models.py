"""Which models leank serves: one judge for startup and for every command.

Both know a model by what its config says. `serving/checks.py` asks vLLM for it, `Attention.of`
reads it without vLLM.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_leank.core.pages import MAX_HEAD_DIM

OTHER = "use another model"

_STATE_SPACE = (
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "mamba",
    "minimax",
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
"""Beginnings of model types whose layers are not all attention, whatever else their configs say."""

_ENCODERS = ("bert", "roberta", "electra", "xlm-roberta", "modernbert", "nomic_bert", "vit", "clip")


@dataclass(frozen=True)
class Attention:
    """What a model's attention has.

    Attributes:
        head_size: channels of a head.
        is_encoder: it does not generate text.
        is_encoder_decoder: it has cross attention.
        is_latent: multi-head latent attention (MLA).
        is_state_space: some layers are no attention.
        is_windowed: some layers do not see all tokens.
        has_soft_cap: logits are capped.
        has_alibi: positions are biases.
        sees_images_both_ways: attention over images is bidirectional.
    """

    head_size: int
    is_encoder: bool = False
    is_encoder_decoder: bool = False
    is_latent: bool = False
    is_state_space: bool = False
    is_windowed: bool = False
    has_soft_cap: bool = False
    has_alibi: bool = False
    sees_images_both_ways: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Attention":
        """The attention of the text part of a model, from its config as `config.json` has it."""
        get = config.get
        hidden, heads = get("hidden_size"), get("num_attention_heads")
        head_size = get("head_dim") or (hidden // heads if hidden and heads else 0)
        kind = str(get("model_type") or "")
        layers = set(get("layer_types") or get("layers_block_type") or ())
        window = get("sliding_window")
        if get("use_sliding_window") is False:
            window = None
        return cls(
            head_size,
            is_encoder=kind in _ENCODERS,
            is_encoder_decoder=bool(get("is_encoder_decoder")),
            is_latent=get("kv_lora_rank") is not None,
            is_state_space=kind.startswith(_STATE_SPACE)
            or any(name in layer for layer in layers for name in ("linear", "mamba", "conv"))
            or get("state_size") is not None,
            is_windowed=bool(window)
            or bool(layers & {"sliding_attention", "chunked_attention"})
            or get("attention_chunk_size") is not None,
            has_soft_cap=bool(get("attn_logit_softcapping")),
            has_alibi=bool(get("alibi")) or kind in ("bloom", "mpt"),
        )

    def refusals(self, other: str = OTHER) -> Iterator[str]:
        """What of it cannot be served; `other` says what to do instead."""
        if self.is_encoder:
            yield f"only text generation is supported; {other}"
            return
        if self.is_encoder_decoder:
            yield f"cross and encoder attention are not supported; {other}"
            return
        if self.is_latent:
            yield f"multi-head latent attention (MLA) is not supported; {other}"
            return
        if self.is_state_space:
            yield f"state-space and linear-attention layers are not supported; {other}"
            return
        if self.is_windowed:
            yield (
                "sliding-window or chunked attention is not supported (full attention in every "
                f"layer is); {other}"
            )
        if self.has_soft_cap:
            yield f"a logits soft cap is not supported; {other}"
        if self.has_alibi:
            yield f"ALiBi is not supported; {other}"
        if self.sees_images_both_ways:
            yield f"bidirectional attention over images is not supported; {other}"
        # Configs that do not tell are refused for what they lack.
        if self.head_size % 32 or self.head_size > MAX_HEAD_DIM:
            yield (
                f"head size {self.head_size} is not a multiple of 32 up to {MAX_HEAD_DIM}; {other}"
            )
