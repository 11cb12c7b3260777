"""Tiny random models in which only some layers have full attention."""

from pathlib import Path
from typing import Any

from tiny_models import save_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

KINDS = [f"{kind}_attention" for kind in ["sliding", "full", "sliding", "sliding", "full"]]
WINDOW = 48

MODELS = {
    "gemma3_text": {"query_pre_attn_scalar": 64},
    "cohere2": {"layer_norm_eps": 1e-5},
    "mistral": {},
    "exaone4": {},
}
"""Fields of their configs, by transformers' type of model."""


def save_mixed(model_type: str, folder: Path, **fields: Any) -> Path:
    """Save a model of five layers, two of them with full attention, in float32."""
    mixed = {"num_hidden_layers": len(KINDS), "layer_types": KINDS, "sliding_window": WINDOW}
    return save_tiny(model_type, folder, **mixed, **(fields or MODELS[model_type]))


def as_vllm_runs_it(folder: Path) -> PreTrainedModel:
    """The model in transformers, with the windows that it has in vLLM."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if model.config.model_type == "cohere2":
        # vLLM's window has one token more, as in training.
        for layer in model.model.layers:
            if layer.self_attn.sliding_window:
                layer.self_attn.sliding_window += 1
    return model
