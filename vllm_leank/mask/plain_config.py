"""Reads the config of common models without transformers, which takes seconds to load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose configs are read here, and whose weights are counted."""

_NEEDED = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "intermediate_size",
    "vocab_size",
)

_ROPE = ("llama3", "default")
"""Kinds of RoPE that mean the same in every transformers."""

MAX_BYTES = 1 << 20


def plain_config(path: str) -> Mapping[str, Any] | None:
    """The `config.json` of a directory, where it says everything that a mask needs; None where
    transformers has to be asked, also for what is wrong with it.
    """
    try:
        file = Path(path, "config.json")
        if file.stat().st_size > MAX_BYTES:
            return None
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict) or config.get("model_type") not in _KINDS:
        return None
    if "auto_map" in config or not all(_is_count(config.get(name)) for name in _NEEDED):
        return None
    if config["model_type"] == "qwen3" and not _is_count(config.get("head_dim")):
        return None  # transformers' own default is none that the other numbers give
    if config["model_type"] == "mistral" and "sliding_window" not in config:
        return None  # transformers takes it for a model whose layers all slide
    if config["model_type"] in ("qwen2", "qwen3") and _slides(config):
        return None  # which layers do is for transformers to say
    if config.get("head_dim") is not None and not _is_count(config["head_dim"]):
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") not in _ROPE:
        return None
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if "type" in rope or type(theta) not in (int, float):
        return None
    return config


def _slides(config: Mapping[str, Any]) -> bool:
    """Whether layers of a Qwen may slide; `sliding_window` alone, which all have, says nothing."""
    window, used = config.get("sliding_window"), config.get("use_sliding_window")
    return bool(window) and used is not False and not config.get("layer_types")


def count_weights(config: Mapping[str, Any]) -> int:
    """Numbers in a model's weights, from a `plain_config`."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kind, head = config["model_type"], config.get("head_dim") or hidden // heads
    queries, keys = heads * head, config["num_key_value_heads"] * head
    inner = config["intermediate_size"]
    layer = 2 * hidden * (queries + keys) + 3 * hidden * inner + 2 * hidden
    if kind == "qwen2":
        layer += queries + 2 * keys
    elif config.get("attention_bias"):
        layer += queries + 2 * keys + hidden
    if config.get("mlp_bias"):
        layer += 2 * inner + hidden
    if kind == "qwen3":
        layer += 2 * head
    ends = 1 if config.get("tie_word_embeddings") else 2
    return int(config["num_hidden_layers"] * layer + (ends * config["vocab_size"] + 1) * hidden)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
