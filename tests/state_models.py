"""Tiny random models in which layers keep states beside full attention: some of LFM2's, of
Granite's, of Nemotron's and of Qwen's layers, and all of Falcon's, which have attention as well.
"""

from pathlib import Path
from typing import Any

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
_DELTA_NETS = {
    "layer_types": KINDS,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}

DELTA_NETS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Those with gated delta nets, a gate for what attention gives, and RoPE on a quarter of a head."""

MODELS = {
    "qwen3_next": _DELTA_NETS | _EXPERTS,
    "qwen3_5_text": _DELTA_NETS | {"mamba_ssm_dtype": "float32"},
    "qwen3_5_moe_text": _DELTA_NETS | _EXPERTS,
    "lfm2": {
        "layer_types": [kind.replace(STATE, "conv") for kind in KINDS],
        "block_auto_adjust_ff_dim": False,
        "block_dim": 256,
        "conv_dim": 256,
    },
    "lfm2_moe": {
        "layer_types": [kind.replace(STATE, "conv") for kind in KINDS],
        "num_dense_layers": 2,
        **_EXPERTS,
    },
    "nemotron_h": {
        "layers_block_type": [STATE, FULL, "mlp", STATE, "mlp", FULL, STATE, STATE],
        "num_hidden_layers": 8,
        "head_dim": 64,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 1,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 64,
        **_EXPERTS,
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


def save_state(model_type: str, folder: Path, **fields: Any) -> Path:
    """Save a model of six or eight layers in float32, with `fields` instead of those of `MODELS`
    that have the same names.
    """
    config = AutoConfig.for_model(model_type, **(_SHARED | MODELS[model_type] | fields))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "norm.weight" in name:  # ones, or zeros where one is added
                torch.nn.init.normal_(parameter, parameter.mean().item(), 0.2)
        model.save_pretrained(folder)
    return folder
