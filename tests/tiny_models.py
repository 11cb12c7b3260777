"""Tiny random models of any type that transformers knows."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

_M_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
_VISION = {"hidden_size": 64, "intermediate_size": 64}
_TOKENS = {
    "image_token_id": 500,
    "video_token_id": 501,
    "vision_start_token_id": 502,
    "vision_end_token_id": 503,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, **_EXPERTS},
    "smollm3": {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
    "paddleocr_vl": {
        "text_config": SIZES | {"rope_parameters": _M_ROPE},
        "vision_config": _VISION | {"num_hidden_layers": 1, "num_attention_heads": 2},
        **_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": SIZES
        | {"head_dim": None, "rope_parameters": _M_ROPE | {"mrope_section": [4, 6, 6]}},
        "vision_config": _VISION | {"depth": 1, "num_heads": 2, "out_hidden_size": 256},
        **_TOKENS,
    },
}
"""Fields of their configs, by transformers' type of model: those whose layers leank serves all."""

NEEDS_TORCHVISION = ("qwen2_5_vl", "qwen3_5_text", "qwen3_5_moe_text")
"""Types whose code in vLLM is in one file with that of models that see images."""


def skip_without_torchvision(model_type: str) -> None:
    """Skip a test that has vLLM import what it cannot import here."""
    if model_type in NEEDS_TORCHVISION and find_spec("torchvision") is None:
        pytest.skip("vLLM needs torchvision to import this model's code")


def save_tiny(model_type: str, folder: Path, **fields: Any) -> Path:
    """Save a random model in float32; its weights are drawn wide, so that attention is far from
    uniform. `fields` are by default those of `MODELS`.
    """
    fields = fields or MODELS[model_type]
    sizes = {} if "text_config" in fields else SIZES
    config = AutoConfig.for_model(model_type, **(sizes | fields))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = class_of(config).from_config(config, dtype=torch.float32)
        make_sinks_felt(model)
        model.save_pretrained(folder)
    return folder


def make_sinks_felt(model: PreTrainedModel) -> None:
    """Random attention sinks, where the model has any, that take much of the weights."""
    for name, parameter in model.named_parameters():
        if name.endswith(".sinks"):
            torch.nn.init.uniform_(parameter, 2, 7)


def load_tiny(folder: Path) -> PreTrainedModel:
    """The model in transformers."""
    return class_of(AutoConfig.from_pretrained(folder)).from_pretrained(folder)


@contextmanager
def class_kept(model: PreTrainedModel) -> Iterator[None]:
    """vLLM makes classes of transformers that it runs its own; afterwards they are as before.
    Within the context, `model` is not compiled.
    """
    kind = type(model.base_model)
    own, bases = dict(vars(kind)), kind.__bases__
    model.base_model.do_not_compile = True
    try:
        yield
    finally:
        kind.__bases__ = bases
        for name in vars(kind).keys() - own.keys():
            delattr(kind, name)
        for name, value in own.items():
            if vars(kind)[name] is not value:
                setattr(kind, name, value)


def class_of(config: PreTrainedConfig) -> Any:
    """What transformers loads such a model with."""
    is_text = config.get_text_config() is config
    return AutoModelForCausalLM if is_text else AutoModelForImageTextToText


def wide_llama() -> PreTrainedModel:
    """Two layers of two KV heads with two query heads each, weights drawn wide."""
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
