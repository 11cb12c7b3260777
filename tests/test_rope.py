"""Turning K back to position 0 undoes what models do, whatever their RoPE settings."""

import pytest
import torch
import transformers

from vllm_leank.core.geometry import Geometry
from vllm_leank.offline.rope import NO_ROTATION, rotation_of, rotation_of_model

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "pad_token_id": None,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
TRAINED = {"original_max_position_embeddings": 512}


def model_of(model_type, **rope):
    parameters = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"} | rope}
    config = transformers.AutoConfig.for_model(model_type, **SHAPE | (parameters if rope else {}))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [
        ("llama", {}),
        ("llama", {"rope_type": "llama3", **LLAMA3, **TRAINED}),
        ("qwen2", {"rope_type": "linear", "factor": 4.0}),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, **TRAINED}),
        ("phi3", {"partial_rotary_factor": 0.5}),
        ("gpt_neox", {"partial_rotary_factor": 0.25}),
    ],
)
def test_k_of_one_token_everywhere_is_one_k_before_rope(model_type, rope):
    model = model_of(model_type, **rope)
    rotation = rotation_of_model(model)
    # In the first layer K depends on the token and the position alone.
    cache = model(torch.full((1, 300), 5)).past_key_values
    key = cache.layers[0].keys[0].detach()
    positions = torch.arange(300)
    back = rotation.back(key, positions)
    torch.testing.assert_close(back, back[:, :1].expand_as(back), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(rotation.forward(back, positions), key, atol=1e-4, rtol=1e-3)
    assert (key[:, 299] - key[:, 0]).norm() > 0.1 * key[:, 0].norm()


@pytest.mark.parametrize(
    ("model_type", "rope"),
    [
        ("cohere", {}),  # pairs neighbours
        ("qwen2", {"rope_type": "dynamic", "factor": 4.0}),  # depends on the length
    ],
)
def test_what_cannot_be_turned_is_not_turned(model_type, rope):
    assert rotation_of_model(model_of(model_type, **rope)) is None


@pytest.mark.parametrize(
    ("theta", "scaling", "known"),
    [
        (None, None, True),
        (1e4, None, True),
        (1e4, {"type": "mrope", "mrope_section": [4, 6, 6]}, True),
        (1e4, {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, False),
        (1e4, {"rope_type": "made-up"}, False),
        (1e4, {"rope_type": "yarn"}, False),  # lacks what it needs
    ],
)
def test_settings_that_are_known(theta, scaling, known):
    rotation = rotation_of(Geometry(1, 2, 32, theta, scaling))
    assert (rotation is not None) == known
    assert (rotation is NO_ROTATION) == (theta is None)


def test_without_rope_nothing_turns():
    x = torch.randn(2, 5, 8)
    assert torch.equal(NO_ROTATION.back(x, torch.arange(5)), x)
    assert torch.equal(NO_ROTATION.forward(x, torch.arange(5)), x)
