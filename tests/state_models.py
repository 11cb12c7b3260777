"""Tiny random models in which layers keep states beside full attention: some of LFM2's and of
Granite's layers, and all of Falcon's, which have attention as well.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

STATE, FULL = "linear_attention", "full_attention"
KINDS = [STATE, FULL, STATE, STATE, FULL, STATE]

_SHARED = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": len(KINDS),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 1,
    "mamba_d_ssm": 256,
}


MODELS = {
    "lfm2": {
        "layer_types": [kind.replace(STATE, "conv") for kind in KINDS],
        "block_auto_adjust_ff_dim": False,
        "block_dim": 256,
        "conv_dim": 256,
    },
    "granitemoehybrid": {
        "layer_types": KINDS,
        "shared_intermediate_size": 256,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "attention_multiplier": 0.125,
        **_MAMBA,
    },
    "falcon_h1": _MAMBA,
}
"""Fields of their configs, by transformers' type of model."""


NATIVE_ROPE = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
"""For an engine with LFM2: the CPU kernel of vLLM 0.32, which eager engines use, takes each head of
a token for a token. Compiled models do not use it."""


def save_state(model_type: str, folder: Path) -> Path:
    """Save a model of six layers in float32."""
    config = AutoConfig.for_model(model_type, **(_SHARED | MODELS[model_type]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
