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
    "granite_swa": {
        "attention_multiplier": 0.125,
        "layer_rope_theta": [1e4 if kind == KINDS[0] else 0 for kind in KINDS],
    },
    # vLLM takes its layers to slide in turns, whatever the config says.
    "gpt_oss": {
        "layer_types": KINDS[:2] * 2,
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
"""Fields of their configs, by transformers' type of model."""


def save_mixed(model_type: str, folder: Path, **fields: Any) -> Path:
    """Save a model of a few layers, two of them with full attention, in float32."""
    mixed = {"num_hidden_layers": len(KINDS), "layer_types": KINDS, "sliding_window": WINDOW}
    return save_tiny(model_type, folder, **(mixed | (fields or MODELS[model_type])))


def as_vllm_runs_it(folder: Path) -> PreTrainedModel:
    """The model in transformers, with the windows that it has in vLLM."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if model.config.model_type == "cohere2":
        # vLLM's window has one token more, as in training.
        for layer in model.model.layers:
            if layer.self_attn.sliding_window:
                layer.self_attn.sliding_window += 1
    return model
