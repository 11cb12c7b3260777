"""The shape of a model's attention, read of its config, and how two of them differ."""

import pytest

from vllm_leank.core.geometry import Geometry
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.text import dump_mask, parse_mask

M_ROPE = {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPE = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SHAPE | {"rope_theta": 1e4}, Geometry(32, 32, 128, 1e4, None)),
        (
            SHAPE | {"num_key_value_heads": None, "head_dim": None},
            Geometry(32, 32, 128, None, None),
        ),
        (SHAPE | {"num_key_value_heads": 8, "head_dim": 64}, Geometry(32, 8, 64, None, None)),
        (SHAPE | {"rope_theta": 500000, "rope_scaling": None}, Geometry(32, 32, 128, 5e5, None)),
        (SHAPE | {"rope_theta": 5e5, "rope_scaling": LLAMA3}, Geometry(32, 32, 128, 5e5, LLAMA3)),
        (
            SHAPE | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
            Geometry(32, 32, 128, 5e5, LLAMA3),
        ),
        (
            SHAPE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            Geometry(32, 32, 128, 1e6, None),
        ),
        (
            SHAPE | {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4}},
            Geometry(32, 32, 128, 1e6, {"rope_type": "yarn", "factor": 4.0}),
        ),
        (
            SHAPE | {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
            Geometry(32, 32, 128, 1e4, {"partial_rotary_factor": 0.5}),
        ),
        ({"text_config": SHAPE | {"rope_theta": 1e4}}, Geometry(32, 32, 128, 1e4, None)),
        (
            SHAPE | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5} | M_ROPE},
            Geometry(32, 32, 128, 1e4, {"partial_rotary_factor": 0.5}),
        ),
    ],
)
def test_geometry_of_config_files(config, expected):
    assert Geometry.from_hf_config(config) == expected


def test_geometry_of_configs_that_lack_something():
    with pytest.raises(ValueError, match="num_hidden_layers"):
        Geometry.from_hf_config({"num_attention_heads": 2, "hidden_size": 64})
    with pytest.raises(
        ValueError, match=r"no layer of the model has full attention \(32 sliding\)"
    ):
        Geometry.from_hf_config(SHAPE | {"sliding_window": 128})
    with pytest.raises(ValueError, match="32 layers, but layer_types of 1"):
        Geometry.from_hf_config(SHAPE | {"layer_types": ["full_attention"]})


def test_geometry_of_a_model_with_sliding_layers():
    """The RoPE of its full layers counts, and a file names these layers."""
    rope = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    kinds = (["sliding_attention"] * 3 + ["full_attention"]) * 8
    mixed = {"rope_parameters": rope, "layer_types": kinds, "sliding_window": 128}
    geometry = Geometry.from_hf_config(SHAPE | mixed)
    assert geometry == Geometry(32, 32, 128, 1e6, None, range(3, 32, 4))
    assert geometry.shape == (8, 32, 128)
    assert str(geometry).startswith("32 layers, 8 of them with full attention, of 32 KV heads")
    mask = Mask.full(geometry)
    assert parse_mask(dump_mask(mask)).geometry == geometry
    assert len(mask.document()["layers"]) == 8
    every = Geometry(2, 2, 64, 1e4, None, (0, 1))
    assert every == Geometry(2, 2, 64, 1e4, None)
    assert every.mismatch(Geometry(2, 2, 64, 1e4, None, (1,))) == (
        "served_layers is [0, 1], not [1]"
    )
    for layers in ([3, 2], [1, 1], [32], []):
        text = dump_mask(mask).replace(str(list(geometry.layers)), str(layers))
        with pytest.raises(MaskError, match="it must name some of the 32 layers, ascending"):
            parse_mask(text)


def test_geometry_of_transformers_configs():
    from transformers import AutoConfig, LlamaConfig, Qwen2Config

    llama = LlamaConfig(
        **SHAPE, num_key_value_heads=8, rope_parameters=LLAMA3 | {"rope_theta": 5e5}
    )
    assert Geometry.from_hf_config(llama) == Geometry(32, 8, 128, 5e5, LLAMA3)
    plain = AutoConfig.for_model("qwen2", **SHAPE, num_key_value_heads=4)
    assert Geometry.from_hf_config(plain) == Geometry(32, 4, 128, 1e4, None)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    qwen = Qwen2Config(**SHAPE, num_key_value_heads=4, rope_parameters=yarn | {"rope_theta": 1e6})
    assert Geometry.from_hf_config(qwen) == Geometry(32, 4, 128, 1e6, yarn)
    assert Geometry.from_hf_config(qwen.to_dict()) == Geometry(32, 4, 128, 1e6, yarn)


def test_mismatch_names_the_first_field():
    geometry = Geometry(4, 2, 128, 5e5, None)
    assert geometry.mismatch(Geometry(4, 2, 128, 500000, {"rope_type": "default"})) is None
    assert geometry.mismatch(Geometry(4, 2, 128, 5e5, {"type": "mrope", "x": None})) is None
    assert geometry.mismatch(Geometry(4, 1, 64, 5e5, None)) == "num_kv_heads is 2, not 1"
    assert (
        geometry.mismatch(Geometry(4, 2, 128, 1e4, None)) == "rope_theta is 500000.0, not 10000.0"
    )
    yarn = Geometry(4, 2, 128, 5e5, {"rope_type": "yarn", "factor": 4.0})
    assert geometry.mismatch(yarn).startswith("rope_scaling is None, not {'rope_type': 'yarn'")
    assert yarn.mismatch(Geometry(4, 2, 128, 5e5, {"factor": 4, "type": "yarn"})) is None
