"""Layers that do not turn q and K: what is said of them is what models do, and masks know it."""

import json

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from mask_samples import full_mask
from mixed_models import MODELS as MIXED
from mixed_models import save_mixed
from tiny_models import MODELS, load_tiny, save_tiny

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.file import load_mask, save_mask
from vllm_leank.mask.rope_pairs import high_frequency_share, pair_shares
from vllm_leank.offline.attention_hook import hooked_attention
from vllm_leank.offline.fisher import QUERIES
from vllm_leank.offline.rope import rotation_of_model

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
NOT_SERVED_IN_TESTS = {
    "afmoe": {**EXPERTS, "num_dense_layers": 1},
    "cohere2_moe": {**EXPERTS, "first_k_dense_replace": 2},
    "exaone_moe": {**EXPERTS, "mlp_layer_types": ["dense", *["sparse"] * 4]},
}

TURNED = {
    "afmoe": [False, False],
    "cohere2": [False, False],
    "cohere2_moe": [True, False],
    "exaone4": [False, False],
    "exaone_moe": [False, False],
    "gemma3_text": [True, True],
    "gpt_oss": [True, True],
    "granite_swa": [False, False],
    "mistral": [True, True],
    "paddleocr_vl": [True, True],
    "qwen2_5_vl": [True, True],
    "qwen3_moe": [True, True],
    "smollm3": [True, False, True],
}


def save(model_type, folder):
    if model_type in MODELS:
        return save_tiny(model_type, folder)
    return save_mixed(model_type, folder, **NOT_SERVED_IN_TESTS.get(model_type, {}))


@pytest.mark.parametrize("model_type", TURNED)
def test_geometries_say_what_models_do(model_type, tmp_path):
    """Far behind the first position the same tokens have the same K before RoPE."""
    assert TURNED.keys() == MIXED.keys() | NOT_SERVED_IN_TESTS.keys() | MODELS.keys()
    model = load_tiny(save(model_type, tmp_path)).eval()
    tokens, keys = torch.arange(10, 40)[None], []

    def keep(layer, query, key, value, attention_mask, scaling, sink_scores):
        keys[-1][layer] = key

    for first in (0, 1000):
        keys.append({})
        positions = torch.arange(first, first + tokens.shape[1])[None]
        with torch.no_grad(), hooked_attention(model, keep):
            model(input_ids=tokens, position_ids=positions, use_cache=False)
    geometry = Geometry.from_hf_config(model.config)
    turned = [
        not torch.allclose(keys[0][layer], keys[1][layer], atol=1e-3) for layer in sorted(keys[0])
    ]
    assert turned == geometry.has_rope == TURNED[model_type]
    if (rotation := rotation_of_model(model)) is not None:
        assert turned == [bool(len(rotation.frequencies))] * len(turned)


def test_mask_files_name_them(tmp_path):
    mask = full_mask(save_tiny("smollm3", tmp_path))
    assert mask.geometry.layers_without_rope == (1,)
    path = tmp_path / "mask.yaml"
    save_mask(mask, path)
    assert load_mask(path).geometry == mask.geometry
    written = path.read_text()
    path.write_text(written.replace("layers_without_rope: [1]", "layers_without_rope: [3]"))
    with pytest.raises(UserError, match=r"layers_without_rope: is \[3\]; it must name some of"):
        load_mask(path)
    path.write_text(written.replace(", layers_without_rope: [1]", ""))
    other = load_mask(path).geometry
    assert mask.geometry.mismatch(other) == "layers_without_rope is [1], not []"


def test_they_have_no_frequencies():
    geometry = Geometry(3, 1, 32, 1e4, None, layers_without_rope=(1,))
    energy = np.ones(geometry.shape)
    assert high_frequency_share(energy, geometry)[:, 0].tolist() == [0.5, 0, 0.5]
    keep = np.zeros(geometry.shape, bool)
    keep[1] = True
    assert (pair_shares(keep, geometry) == 0).all()


@pytest.mark.parametrize("model_type", ["smollm3", "paddleocr_vl"])
def test_means_of_masks_are_those_of_k_as_it_is_read(model_type, tmp_path, leank):
    """One mean for all positions: what a layer without RoPE needs, and positions of three numbers
    allow. The model that sees images is loaded for its text.
    """
    model = save_tiny(model_type, tmp_path / "model")
    byte_tokenizer().save_pretrained(model)
    tokens = torch.arange(600) * 7 % 250
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt_token_ids": tokens.tolist()}))
    code, _, err = leank(
        "mask", "calibrate", model, "--bits", "2", "--data", tmp_path / "p.jsonl", "--sink", "32",
        "--recent", "64", "--out", tmp_path / "mask.yaml", "--dtype", "float32",
    )  # fmt: skip
    assert code == 0, err
    mask, far = load_mask(tmp_path / "mask.yaml"), {}

    def keep(layer, query, key, value, attention_mask, scaling, sink_scores):
        far[layer] = key[0]

    loaded = load_tiny(model)
    with torch.no_grad(), hooked_attention(loaded, keep):
        loaded(input_ids=tokens[None], use_cache=False)
    end = Window(32, 64).boundary(len(tokens) - QUERIES + 1)
    found = torch.stack([far[layer][:, 32:end].mean(1) for layer in sorted(far)])
    assert mask.statistics.k_mean == pytest.approx(found.numpy(), abs=2e-3)
