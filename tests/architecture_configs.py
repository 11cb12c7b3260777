"""A small `config.json` for each text architecture that vLLM knows."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 6

STAND_INS = {
    "BailingMoeV2_5ForCausalLM": "llama",
    "BailingMoeV3ForCausalLM": "llama",
    "InklingForConditionalGeneration": "inkling_mm_model",
    "LongcatFlashNgramForCausalLM": "longcat_flash",
    "MiMoV2ForCausalLM": "mimo_v2_flash",
    "MistralLarge3ForCausalLM": "deepseek_v3",
    "NemotronHPuzzleForCausalLM": "nemotron_h",
    "PanguUltraMoEForCausalLM": "deepseek_v3",
    "PhiMoEForCausalLM": "phimoe",
    "SarvamMLAForCausalLM": "deepseek_v3",
    "Rnj1ForCausalLM": "gemma3_text",
}
"""Types of models whose configs have the same fields, for architectures whose own are in no
transformers: else Llama's. What code says of an architecture shows all the same.
"""

MIXED = [f"{kind}_attention" for kind in ["sliding", "full", "sliding"]] * 2

FIELDS: dict[str, dict[str, Any]] = {
    "arcee": {"head_dim": 64},
    "bloom": {"hidden_size": 128, "n_head": 2},
    "dbrx": {"d_model": 128, "n_heads": 2},
    "deepseek_v4": {"compress_ratios": [4] * LAYERS, "layer_types": None, "mlp_layer_types": None},
    "glm4_moe": {"head_dim": 128},
    "inkling_mm_model": {"text_config": {"num_hidden_layers": LAYERS}},
    "laguna": {"layer_types": MIXED},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 3},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 3, "head_dim": 64, "conv_dim": 2560},
    "mellum": {"layer_types": MIXED},
    "ministral3": {"sliding_window": None},
    "mistral": {"sliding_window": None},
    "nemotron": {"num_key_value_heads": 8},
    "stablelm": {"hidden_size": 2048},
    "zamba2": {"num_hidden_layers": 54},
}
"""What transformers leaves out, or has otherwise than models that are served."""


def save_config(architecture: str, folder: Path) -> Path:
    """Write the config of an architecture with six layers."""
    model_type = STAND_INS.get(architecture) or _types().get(architecture, "llama")
    fields = FIELDS.get(model_type, {})
    if "text_config" not in fields:
        fields = {"num_hidden_layers": LAYERS} | fields
    unset = [name for name, value in fields.items() if value is None]
    given = {name: value for name, value in fields.items() if value is not None}
    config = json.loads(AutoConfig.for_model(model_type, **given).to_json_string())
    for name in unset:
        config[name] = None
    config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _types() -> dict[str, str]:
    """Model types by architecture; of two, that of the text part."""
    found = {}
    for model_type, classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in [classes] if isinstance(classes, str) else classes:
            found[name] = model_type
    return found
