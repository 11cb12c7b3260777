"""Models and layers that cannot be served, at startup and where a model is loaded."""

import json
from re import escape
from types import SimpleNamespace

import pytest
import torch
from leank_configs import SLIDING_WINDOW, config_of
from mask_samples import full_mask
from mixed_models import save_mixed

from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import save_mask
from vllm_leank.serving.checks import judge
from vllm_leank.serving.settings import load_settings

MODELS = {
    "sliding window": (
        SLIDING_WINDOW,
        "sliding-window attention in all of its 2 layers keeps nothing that leank could prune",
    ),
    "chunked layers": (
        {"layer_types": ["full_attention", "chunked_attention"]},
        "layers with chunked_attention are not supported",
    ),
    "sliding layers without a window": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "1 full, 1 sliding layers without a sliding_window are not supported",
    ),
    "layers that share K and V": ({"num_kv_shared_layers": 1}, "layers that share their K and V"),
    "other heads in full layers": ({"global_head_dim": 128}, "heads of 128 in full layers"),
    "a mask for other layers": (
        {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]},
        "served_layers is [0, 1], not [0]",
    ),
    "soft cap": (
        {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "attn_logit_softcapping": 50.0,
        },
        "a logits soft cap is not supported",
    ),
    "latent attention": (
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "kv_lora_rank": 64,
            "q_lora_rank": None,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
        },
        "multi-head latent attention (MLA) is not supported",
    ),
    "state space": (
        {
            "architectures": ["MambaForCausalLM"],
            "model_type": "mamba",
            "state_size": 16,
            "expand": 2,
            "conv_kernel": 4,
            "time_step_rank": 8,
        },
        "state-space and linear-attention layers are not supported",
    ),
    "encoder": (
        {"architectures": ["BertModel"], "model_type": "bert"},
        "only text generation is supported",
    ),
    "encoder and decoder": (
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "d_model": 128,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "max_source_positions": 64,
            "max_target_positions": 64,
        },
        "cross and encoder attention are not supported",
    ),
    "head size": ({"head_dim": 48}, "head size 48 is not a multiple of 32"),
    "large heads": ({"head_dim": 512}, "head size 512 is not a multiple of 32 up to 256"),
    "a checkpoint with an fp8 KV cache": (
        {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "naive-quantized",
                "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
                "config_groups": {},
            }
        },
        "use --kv-cache-dtype bfloat16",
    ),
    "other RoPE": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "whose geometry is not that of",
    ),
    "other number of layers": ({"num_hidden_layers": 1}, "num_layers is 2, not 1"),
}


BY_THE_MASK_OR_FLAG = [
    MODELS[name][1]
    for name in (
        "a checkpoint with an fp8 KV cache",
        "a mask for other layers",
        "other RoPE",
        "other number of layers",
    )
]


LONG = "state space", "soft cap", "encoder", "encoder and decoder"
"""vLLM looks at an architecture in a process of its own, which takes ten seconds at first."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(*one, id=name, marks=pytest.mark.long if name in LONG else ())
        for name, one in MODELS.items()
    ],
)
def test_models(tiny_llama_dir, mask_file, tmp_path, changes, message):
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match="(?s)" + escape(message)):
        config_of(model, {"mask": str(mask_file)})
    if message in BY_THE_MASK_OR_FLAG:
        return
    # Commands that make masks, and plan, say the same before any work.
    with pytest.raises(UserError, match="leank cannot serve this model: .*" + escape(message)):
        Checkpoint.open(str(model))


def test_sliding_layers_beside_served_ones_are_no_reason(tmp_path, monkeypatch):
    model = save_mixed("gemma3_text", tmp_path / "model")
    save_mask(full_mask(model), tmp_path / "m.yaml")
    config = config_of(model, {"mask": str(tmp_path / "m.yaml")})
    assert judge(config)[1] == []
    config.model_config.dtype = torch.bfloat16
    gpu = SimpleNamespace(is_cuda=lambda: True, has_device_capability=lambda _: True)
    monkeypatch.setattr("vllm.platforms.current_platform", gpu)
    assert judge(config)[1] == []


LAYERS = {
    "ALiBi": {"alibi_slopes": [1.0]},
    "sliding-window attention": {"sliding_window": 128},
    "a logits soft cap": {"logits_soft_cap": 30.0},
    "encoder_only attention": {"attn_type": "encoder_only"},
    "encoder_decoder attention": {"attn_type": "encoder_decoder"},
    "KV sharing between layers": {"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"},
}


@pytest.mark.parametrize(("feature", "arguments"), LAYERS.items(), ids=LAYERS)
def test_layers(feature, arguments):
    """A model's code may ask for what its config does not show."""
    from vllm_leank.serving.impl import LeanKImpl

    with pytest.raises(ValueError, match=f"leank does not support {feature}"):
        LeanKImpl(1, 64, 1.0, 1, **arguments)


def test_a_layer_with_a_backend_of_its_own():
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    from vllm_leank.serving.archive import ArchiveBackend
    from vllm_leank.serving.impl import check_all_layers

    class Other(AttentionLayerBase):
        def get_attn_backend(self):
            return ArchiveBackend

        def get_kv_cache_spec(self, vllm_config):
            return None

    geometry, other = Geometry(2, 2, 64, 1e4, None, (0,)), Other()
    other.sliding_window = 64
    check_all_layers(
        {"model.layers.0.mlp.experts": object(), "model.layers.1.attn": other}, geometry
    )
    with pytest.raises(ValueError, match=r"but model\.layers\.0\.attn has a backend of its own"):
        check_all_layers({"model.layers.0.attn": other}, geometry)
    with pytest.raises(ValueError, match=r"but model\.layers\.1\.attn has a backend of its own"):
        check_all_layers({"model.layers.1.attn": Other()}, geometry)


def test_a_layer_of_another_kind_than_causal_attention():
    """vLLM's own subclasses: one reads prompts both ways."""
    from vllm.model_executor.layers.attention import Attention

    from vllm_leank.serving.impl import check_kind

    class PrefillPrefixLMAttention(Attention):
        """Only its kind is looked at."""

    check_kind("model.layers.0.attn", object.__new__(Attention))
    with pytest.raises(ValueError, match="not support PrefillPrefixLMAttention, which"):
        check_kind("model.layers.0.attn", object.__new__(PrefillPrefixLMAttention))


def test_a_layer_that_slides_by_the_config_alone():
    """vLLM has gpt-oss slide in turns, whatever its layer_types are."""
    from vllm_leank.serving.impl import served_index

    geometry = Geometry(4, 2, 64, 1e4, None, (1, 3))
    assert served_index("model.layers.3.attn", geometry) == 1
    with pytest.raises(ValueError, match=r"model\.layers\.2\.attn has full attention, but"):
        served_index("model.layers.2.attn", geometry)


MIXED = {
    "pruned prompts": ({"prefill": "pruned"}, {}, 'the option prefill "pruned" is for models'),
    "pipeline": ({}, {"pipeline_parallel_size": 2}, "remove --pipeline-parallel-size"),
    "draft model": ({}, {"speculative_config": True}, "use another method in --speculative-config"),
}


@pytest.mark.parametrize(("options", "flags", "message"), MIXED.values(), ids=MIXED)
def test_what_does_not_go_with_sliding_layers(tiny_llama_dir, tmp_path, options, flags, message):
    model = save_mixed("gemma3_text", tmp_path / "model")
    save_mask(full_mask(model), tmp_path / "mask.yaml")
    if "speculative_config" in flags:
        draft = {"method": "draft_model", "model": str(tiny_llama_dir)}
        flags = {"speculative_config": draft | {"num_speculative_tokens": 2}}
    given = {"mask": str(tmp_path / "mask.yaml")}
    assert load_settings(config_of(model, given)).plan.sliding is not None
    with pytest.raises(ValueError, match="(?s)leank cannot serve this.*" + escape(message)):
        config_of(model, given | options, **flags)
