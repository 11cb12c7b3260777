"""Tiny random models in which only some layers have full attention."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

KINDS = [f"{kind}_attention" for kind in ["sliding", "full", "sliding", "sliding", "full"]]
WINDOW = 48

MODELS = {
    "gemma3_text": {"query_pre_attn_scalar": 64},
    "cohere2": {"layer_norm_eps": 1e-5},
    "mistral": {},
    "exaone4": {},
}
"""Fields of their configs, by transformers' type of model."""


def save_mixed(model_type: str, folder: Path) -> Path:
    """Save a model of five layers, two of them with full attention, in float32."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=len(KINDS),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        initializer_range=0.1,
        sliding_window=WINDOW,
        layer_types=KINDS,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **MODELS[model_type],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def as_vllm_runs_it(folder: Path) -> PreTrainedModel:
    """The model in transformers, with the windows that it has in vLLM."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if model.config.model_type == "cohere2":
        # vLLM's window has one token more, as in training.
        for layer in model.model.layers:
            if layer.self_attn.sliding_window:
                layer.self_attn.sliding_window += 1
    return model
