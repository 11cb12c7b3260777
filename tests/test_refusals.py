"""What cannot be served ends startup with one message that says what to change."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from re import escape
from types import SimpleNamespace

import pytest
from mask_samples import coded_mask, full_mask, random_mask
from mixed_models import save_mixed
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import save_mask
from vllm_leank.serving.checks import judge
from vllm_leank.serving.settings import load_settings

load_general_plugins()  # as the command line does before it reads an option


@pytest.fixture
def mask_file(tiny_llama_dir, tmp_path):
    path = tmp_path / "mask.yaml"
    save_mask(random_mask(tiny_llama_dir, [32, 0]), path)
    return path


def config_of(model, options, **args):
    args = {"attention_backend": "leank", "skip_tokenizer_init": True} | args
    additional = {"leank": options} if options is not None else {}
    return EngineArgs(model=str(model), additional_config=additional, **args).create_engine_config()


def test_a_good_config_passes(tiny_llama_dir, mask_file):
    config = config_of(tiny_llama_dir, {"mask": str(mask_file)})
    assert config.attention_config.backend.name == "LEANK"


def test_the_dtype_of_the_model_may_be_named(tiny_llama_dir, mask_file):
    config_of(tiny_llama_dir, {"mask": str(mask_file)}, dtype="bfloat16", kv_cache_dtype="bfloat16")


def test_a_config_carries_the_mask_that_it_was_made_with(tiny_llama_dir, tmp_path):
    """Also to other processes, and when the file has changed since."""
    path = tmp_path / "mask.yaml"
    masks = [random_mask(tiny_llama_dir, counts) for counts in ([32, 0], [64])]
    configs = []
    for mask in masks:
        save_mask(mask, path, overwrite=True)
        configs.append(config_of(tiny_llama_dir, {"mask": str(path)}))
    path.unlink()
    for mask, config in zip(masks, configs, strict=True):
        assert load_settings(config).mask.sha256 == mask.sha256
        copy = load_settings(pickle.loads(pickle.dumps(config)))
        assert (copy.mask.keep == mask.keep).all()
        assert copy.plan == load_settings(config).plan


def test_a_compile_cache_is_of_one_mask_and_one_window(tiny_llama_dir, tmp_path):
    """The same options, path included, but another mask in the file: another key."""
    path = tmp_path / "mask.yaml"

    def key(counts, **options):
        save_mask(random_mask(tiny_llama_dir, counts), path, overwrite=True)
        config = config_of(tiny_llama_dir, {"mask": str(path)} | options)
        return config.compute_hash()

    first = key([32, 0])
    assert key([32, 0]) == first
    others = [key([64]), key([32, 0], sink=32), key([32, 0], archive_dtype="fp8")]
    assert len({first, *others}) == 4


OPTIONS = {
    "unknown option": (
        {"sinks": 64},
        'no option "sinks"; allowed: mask, sink, recent, archive_dtype',
    ),
    "unknown archive dtype": ({"archive_dtype": "int8"}, "must be one of: auto, "),
    "sink of a wrong type": ({"sink": "64"}, "option sink = '64'"),
    "sink not in whole pages": ({"sink": 30}, "sink is 30, but must be 0 or a multiple of 32"),
    "recent below a step": ({"recent": 16}, "recent is 16, but must be at least 32"),
    "no such mask": ({"mask": "/no/such/mask.yaml"}, "/no/such/mask.yaml: cannot be read"),
    "a folder for a mask": ({"mask": "/"}, "not a regular file"),
    "an empty mask path": ({"mask": ""}, "option mask = ''"),
    "options that are no mapping": ("mask.yaml", "must be a mapping of options"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options(tiny_llama_dir, mask_file, options, message):
    if isinstance(options, dict):
        options = {"mask": str(mask_file)} | options
    with pytest.raises(ValueError, match="(?s)" + escape(message)):
        config_of(tiny_llama_dir, options)


FLAGS = {
    "fp8 KV cache": (
        {"kv_cache_dtype": "fp8"},
        "use --kv-cache-dtype bfloat16; far tokens of fewer bits are leank's own: make a mask of",
    ),
    "one kind of layers": (
        {"attention_config": {"backend_per_kind": {"full_attention": "LEANK"}}},
        "remove backend_per_kind",
    ),
}


@pytest.mark.parametrize(("flags", "message"), FLAGS.values(), ids=FLAGS)
def test_flags(tiny_llama_dir, mask_file, flags, message):
    if "attention_config" in flags:
        flags = {"attention_backend": None} | flags
    with pytest.raises(ValueError, match="(?s)leank cannot serve this.*" + escape(message)):
        config_of(tiny_llama_dir, {"mask": str(mask_file)}, **flags)


# Models with layers for multi-token prediction have them in the same checkpoint.
MTP = {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "num_nextn_predict_layers": 1}


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp"])
def test_a_drafter_that_goes_on_from_the_models_layers(tiny_llama_dir, mask_file, tmp_path, method):
    model, draft = tmp_path / "model", tmp_path / method
    for folder in (model, draft):
        shutil.copytree(tiny_llama_dir, folder)
    speculation = {"method": method, "model": str(draft), "num_speculative_tokens": 2}
    if method == "mtp":
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | MTP))
        del speculation["model"]
    message = f"method {method} drafts with layers that go on from the served model's"
    with pytest.raises(ValueError, match=message):
        config_of(model, {"mask": str(mask_file)}, speculative_config=speculation)


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "suffix"])
def test_a_drafter_that_reads_text(tiny_llama_dir, mask_file, monkeypatch, method):
    monkeypatch.setattr("vllm.config.speculative.has_arctic_inference", lambda: True)
    speculation = {"method": method, "num_speculative_tokens": 6}
    config = config_of(tiny_llama_dir, {"mask": str(mask_file)}, speculative_config=speculation)
    assert config.speculative_config.method == method


SLIDING_WINDOW = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 128,
}
DRAFTS = {
    "another backend": ({}, {"attention_backend": "FLASH_ATTN"}, "remove attention_backend and kv"),
    "another cache dtype": ({}, {"kv_cache_dtype": "fp8"}, "remove attention_backend and kv"),
    "sliding window": (
        SLIDING_WINDOW,
        {},
        "attention in all of its 2 layers keeps nothing that leank could prune; use another draft",
    ),
}


@pytest.mark.parametrize(("config", "flags", "message"), DRAFTS.values(), ids=DRAFTS)
def test_draft_models(tiny_llama_dir, mask_file, tmp_path, config, flags, message):
    draft = tmp_path / "draft"
    shutil.copytree(tiny_llama_dir, draft)
    path = draft / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    speculation = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="(?s)leank cannot serve this.*" + escape(message)):
        config_of(tiny_llama_dir, {"mask": str(mask_file)}, speculative_config=speculation | flags)


def test_more_drafts_than_are_dense(tiny_llama_dir, mask_file):
    speculation = {"method": "ngram", "num_speculative_tokens": 33}
    options = {"mask": str(mask_file), "recent": 32}
    with pytest.raises(ValueError, match="recent is 32, but must be at least the 33 of num_spec"):
        config_of(tiny_llama_dir, options, speculative_config=speculation)
    speculation["num_speculative_tokens"] = 32
    config_of(tiny_llama_dir, options, speculative_config=speculation)


def test_another_layout_of_the_cache(tiny_llama_dir, mask_file, monkeypatch):
    monkeypatch.setattr("vllm.envs.VLLM_KV_CACHE_LAYOUT", "LBNHC", raising=False)
    with pytest.raises(ValueError, match="pages lie as BLHNC: unset VLLM_KV_CACHE_LAYOUT"):
        config_of(tiny_llama_dir, {"mask": str(mask_file)})


def test_batch_invariant_mode(tiny_llama_dir, mask_file, monkeypatch):
    monkeypatch.setattr("vllm.envs.VLLM_BATCH_INVARIANT", True)
    with pytest.raises(ValueError, match="unset VLLM_BATCH_INVARIANT"):
        config_of(tiny_llama_dir, {"mask": str(mask_file)})


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
    "sinks": (
        {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "attention sinks as parameters are not supported",
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


@pytest.mark.parametrize(("changes", "message"), MODELS.values(), ids=MODELS)
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


@pytest.mark.parametrize(
    ("capability", "archive_dtype", "refused"),
    [
        ((8, 0), "auto", None),
        ((7, 5), "auto", "needs a GPU of compute capability 8.0 or newer"),
        ((8, 6), "fp8", "needs a GPU of compute capability 8.9 or newer: remove it from"),
        ((8, 9), "fp8", None),
    ],
)
def test_what_a_gpu_must_have(
    tiny_llama_dir, mask_file, monkeypatch, capability, archive_dtype, refused
):
    config = config_of(tiny_llama_dir, {"mask": str(mask_file), "archive_dtype": archive_dtype})
    gpu = SimpleNamespace(
        is_cuda=lambda: True, has_device_capability=lambda needed: capability >= needed
    )
    monkeypatch.setattr("vllm.platforms.current_platform", gpu)
    _, reasons = judge(config)
    assert len(reasons) == (refused is not None)
    assert refused is None or refused in reasons[0]


def test_codes_are_served_on_any_gpu_that_leank_takes(tiny_llama_dir, tmp_path, monkeypatch):
    save_mask(coded_mask(tiny_llama_dir), tmp_path / "m.yaml")
    config = config_of(tiny_llama_dir, {"mask": str(tmp_path / "m.yaml")})
    gpu = SimpleNamespace(
        is_cuda=lambda: True, has_device_capability=lambda needed: needed <= (8, 0)
    )
    monkeypatch.setattr("vllm.platforms.current_platform", gpu)
    settings, reasons = judge(config)
    assert reasons == []
    assert settings.plan.archive_format.name == "packed"


def test_sliding_layers_are_not_served_where_they_were_never_tried(tmp_path, monkeypatch):
    model = save_mixed("gemma3_text", tmp_path / "model")
    save_mask(full_mask(model), tmp_path / "m.yaml")
    config = config_of(model, {"mask": str(tmp_path / "m.yaml")})
    assert judge(config)[1] == []
    gpu = SimpleNamespace(is_cuda=lambda: True, has_device_capability=lambda _: True)
    monkeypatch.setattr("vllm.platforms.current_platform", gpu)
    assert "models with sliding layers are served on CPU only" in "; ".join(judge(config)[1])


def test_a_model_without_a_mask_is_told_how_to_make_one(tiny_llama_dir):
    command = re.escape(f"leank mask calibrate {tiny_llama_dir} --bits 2\n")
    with pytest.raises(ValueError, match=command):
        config_of(tiny_llama_dir, {})


MISPLACED = {
    "no level": ({"mask": "m.yaml"}, '{"leank": {"mask": "m.yaml"}}'),
    "one of its options": ({"sink": 64, "recent": 256}, '{"leank": {"sink": 64, "recent": 256}}'),
    "another case": ({"Leank": {"sink": 64}}, '{"leank": {"sink": 64}}'),
    "a hyphen": ({"lean-k": {"sink": 64}}, '{"leank": {"sink": 64}}'),
    "letters changed": ({"laenk": {"sink": 64}}, '{"leank": {"sink": 64}}'),
    "with its package": ({"vllm_leank": {"sink": 64}}, '{"leank": {"sink": 64}}'),
    "half": ({"leank": {"sink": 64}, "recent": 256}, '{"leank": {"recent": 256}}'),
}


@pytest.mark.parametrize(("additional", "right"), MISPLACED.values(), ids=MISPLACED)
def test_options_out_of_place(tiny_llama_dir, additional, right):
    arguments = {"model": str(tiny_llama_dir), "skip_tokenizer_init": True}
    arguments["additional_config"] = additional
    with pytest.raises(ValueError, match="(?s)leank cannot serve.*write '" + escape(right)):
        EngineArgs(**arguments, attention_backend="leank").create_engine_config()
    if additional.keys() & {"sink", "recent"} and "leank" not in additional:
        return  # may be somebody else's
    with pytest.raises(ValueError, match="leank is not selected: add --attention-backend leank"):
        EngineArgs(**arguments).create_engine_config()


def test_what_others_have_in_the_same_place_stays(tiny_llama_dir, mask_file):
    """Other plugins read the same flag."""
    theirs = {"torch_graph": {"mode": 1}, "mask": {"kind": "causal"}, "lean": 1, "rank": 2}
    arguments = {"model": str(tiny_llama_dir), "skip_tokenizer_init": True}
    del theirs["lean"]
    EngineArgs(**arguments, additional_config=theirs).create_engine_config()
    del theirs["mask"]
    both = theirs | {"leank": {"mask": str(mask_file)}}
    chosen = {"attention_backend": "leank", "additional_config": both}
    EngineArgs(**arguments, **chosen).create_engine_config()


@pytest.mark.parametrize("backend", ["leank", None])
def test_python_is_told_as_the_command_line_is(tiny_llama_dir, backend):
    """`LLM(...)` ends before anything is loaded."""
    from vllm import LLM

    with pytest.raises(ValueError, match='"Leank" where "leank" is expected'):
        LLM(
            str(tiny_llama_dir),
            skip_tokenizer_init=True,
            attention_backend=backend,
            additional_config={"Leank": {"sink": 64}},
        )


def test_a_refusal_stands_before_and_after_the_traceback(tiny_llama_dir, capfd, monkeypatch):
    from vllm_leank.serving import last_word

    monkeypatch.setattr(sys, "argv", ["/bin/vllm", "serve", str(tiny_llama_dir), "--seed", "1"])
    with pytest.raises(ValueError, match="leank cannot serve this") as caught:
        config_of(tiny_llama_dir, {"mask": "/none.yaml"})
    assert sys.excepthook is last_word._hook
    sys.excepthook(caught.type, caught.value, caught.tb)
    said = capfd.readouterr().err.splitlines()
    refusal = (
        "leank: leank cannot serve this: /none.yaml: cannot be read: No such file or directory"
    )
    assert said[0] == said[-2] == refusal
    assert said[1] == said[-1]
    assert said[1].endswith(f"leank doctor -- vllm serve {tiny_llama_dir} --seed 1")
    assert "Traceback (most recent call last):" in said
    sys.excepthook(TypeError, TypeError("other"), None)
    assert "leank" not in capfd.readouterr().err


def test_options_without_the_backend(tiny_llama_dir, mask_file):
    with pytest.raises(ValueError, match="add --attention-backend leank"):
        config_of(tiny_llama_dir, {"mask": str(mask_file)}, attention_backend=None)


LAYERS = {
    "ALiBi": {"alibi_slopes": [1.0]},
    "sliding-window attention": {"sliding_window": 128},
    "a logits soft cap": {"logits_soft_cap": 30.0},
    "attention sink parameters": {"sinks": [0.0]},
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


def test_plain_vllm_is_as_without_the_plugin(tiny_llama_dir):
    """Same config and same choice of backend whether the plugin is loaded or not; and where it is
    missing, leank cannot be chosen.
    """
    script = """
import sys
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
config = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True).create_engine_config()
from vllm.v1.attention.selector import get_attn_backend
from vllm.config import set_current_vllm_config
import torch
with set_current_vllm_config(config):
    backend = get_attn_backend(64, torch.float32, "auto")
modules = sorted(name for name in sys.modules if name.startswith("vllm_leank"))
leank = {"attention_backend": "leank", "additional_config": {"leank": {"sink": 32}}}
try:
    EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, **leank).create_engine_config()
except Exception as error:
    refusal = str(error).replace("\\n", " ")
print(backend.get_name(), config.compute_hash(), config.model_config.rswa_window)
print(modules)
print(refusal)
"""

    def run(plugins):
        result = subprocess.run(
            [sys.executable, "-c", script, str(tiny_llama_dir)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"VLLM_PLUGINS": plugins},
        )
        return result.stdout.splitlines()[-3:]

    (with_plugin, modules, refusal), (without, none, unknown) = run("leank"), run("")
    assert with_plugin == without
    assert "vllm_leank.serving.plugin" in modules
    assert none == "[]"
    assert f"  leank mask calibrate {tiny_llama_dir} --bits 2 or name a mask file" in refusal
    assert "Unknown attention backend: 'LEANK'" in unknown
