"""What models have that leank cannot serve: each with what, why, and what to do instead."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm_leank.core.layers import FULL, SLIDING, describe_layers, layer_kinds
from vllm_leank.core.pages import MAX_HEAD_DIM
from vllm_leank.errors import UserError

if TYPE_CHECKING:
    from vllm.config import ModelConfig


WHOLE_ARCHITECTURES = {
    "GptOssForCausalLM": "attention sinks as parameters are not supported",
    "BloomForCausalLM": "ALiBi is not supported",
    "Step1ForCausalLM": "ALiBi is not supported",
}
"""What architectures have that their configs do not show."""


def model_reasons(model: "ModelConfig", other: str) -> Iterator[str]:
    """What a model's attention has that cannot be served; `other` says what to do instead."""
    text = model.hf_text_config
    if model.is_encoder_decoder:
        yield f"cross and encoder attention are not supported; {other}"
        return
    if model.is_diffusion:
        yield f"diffusion language models are not supported; {other}"
        return
    if model.use_mla:
        yield f"multi-head latent attention (MLA) is not supported; {other}"
        return
    if model.is_hybrid or model.is_attention_free:
        yield f"state-space and linear-attention layers are not supported; {other}"
        return
    for name in WHOLE_ARCHITECTURES.keys() & set(model.architectures):
        yield f"{WHOLE_ARCHITECTURES[name]}; {other}"
    yield from (f"{reason}; {other}" for reason in _layers(model, text))
    if getattr(text, "attn_logit_softcapping", None):
        yield f"a logits soft cap is not supported; {other}"
    if model.is_mm_prefix_lm:
        yield (
            "bidirectional attention over images is not supported: serve text alone, with "
            "--language-model-only"
        )
    head_size = model.get_head_size()
    if head_size % 32 or head_size > MAX_HEAD_DIM:
        yield f"head size {head_size} is not a multiple of 32 up to {MAX_HEAD_DIM}; {other}"


def _layers(model: "ModelConfig", text: Any) -> Iterator[str]:
    """What its layers are that cannot be served, or cannot be served beside each other."""
    try:
        kinds = layer_kinds(text)
    except UserError as error:
        yield str(error)
        return
    if others := sorted(set(kinds) - {FULL, SLIDING}):
        yield f"layers with {', '.join(others)} are not supported"
    elif FULL not in kinds or (SLIDING not in kinds and model.get_sliding_window()):
        yield (
            f"sliding-window attention in all of its {len(kinds)} layers keeps nothing that leank "
            "could prune"
        )
    elif SLIDING in kinds and not model.get_sliding_window():
        yield (
            f"{describe_layers(kinds)} layers without a sliding_window are not supported: remove "
            "--disable-sliding-window, if it is given"
        )
    if getattr(text, "num_kv_shared_layers", None):
        yield "layers that share their K and V are not supported"
    if getattr(text, "global_head_dim", None) not in (None, model.get_head_size()):
        yield "heads of another size in layers with full attention are not supported"
    heads = getattr(text, "num_key_value_heads", None)
    if getattr(text, "num_global_key_value_heads", None) not in (None, heads):
        yield "more or fewer KV heads in layers with full attention are not supported"
