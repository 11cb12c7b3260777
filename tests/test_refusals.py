"""What cannot be served ends startup with one message that says what to change."""

import json
import pickle
import re
import shutil
import sys
from re import escape
from types import SimpleNamespace

import fresh
import pytest
from leank_configs import SLIDING_WINDOW, config_of
from mask_samples import coded_mask, random_mask
from vllm.engine.arg_utils import EngineArgs

from vllm_leank.mask.file import save_mask
from vllm_leank.serving.checks import judge
from vllm_leank.serving.settings import load_settings


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
    others = [key([64]), key([32, 0], sink=32), key([32, 0], prefill="pruned")]
    assert len({first, *others}) == 4


OPTIONS = {
    "unknown option": (
        {"sinks": 64},
        'no option "sinks"; allowed: mask, sink, recent, prefill',
    ),
    "retired option": ({"archive_dtype": "fp8"}, "is a mask of bits: leank mask calibrate MODEL"),
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
    "version of FlashAttention": (
        {"attention_config": {"backend": "LEANK", "flash_attn_version": 2}},
        "remove flash_attn_version",
    ),
    "a load format": ({"load_format": "tensorizer"}, "use another load format"),
}


@pytest.mark.parametrize(("flags", "message"), FLAGS.values(), ids=FLAGS)
def test_flags(tiny_llama_dir, mask_file, flags, message):
    if "attention_config" in flags:
        flags = {"attention_backend": None} | flags
    with pytest.raises(ValueError, match="(?s)leank cannot serve this.*" + escape(message)):
        config_of(tiny_llama_dir, {"mask": str(mask_file)}, **flags)


def test_the_config_of_a_models_text_part_has_the_settings(tiny_llama_dir, mask_file):
    """vLLM derives it for most models that read images as well, field by field."""
    config = config_of(tiny_llama_dir, {"mask": str(mask_file)})
    derived = config.with_hf_config(config.model_config.hf_config, ["LlamaForCausalLM"])
    assert derived is not config
    assert load_settings(derived) is load_settings(config)


# Models with layers for multi-token prediction have them in the same checkpoint.
MTP = {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "num_nextn_predict_layers": 1}


@pytest.mark.parametrize(
    "method",
    ["eagle3", *(pytest.param(one, marks=pytest.mark.long) for one in ("eagle", "mtp"))],
)
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


DRAFTS = {
    "another backend": ({}, {"attention_backend": "FLASH_ATTN"}, "remove attention_backend and kv"),
    "another cache dtype": ({}, {"kv_cache_dtype": "fp8"}, "remove attention_backend and kv"),
    "drafts cut on the device": (
        {},
        {"enable_adaptive_verification": True},
        "remove enable_adaptive_verification",
    ),
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


@pytest.mark.parametrize(
    ("capability", "refused"),
    [((8, 0), None), ((7, 5), "needs a GPU of compute capability 8.0 or newer")],
)
def test_what_a_gpu_must_have(tiny_llama_dir, mask_file, monkeypatch, capability, refused):
    config = config_of(tiny_llama_dir, {"mask": str(mask_file)})
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

    # An engine of this process may have left torch's hook, which begins each line with a rank.
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
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


def test_plain_vllm_is_as_without_the_plugin(tiny_llama_dir):
    """Same config and same choice of backend whether the plugin is loaded or not; and where it is
    missing, leank cannot be chosen.
    """
    script = """
import sys
from vllm.engine.arg_utils import EngineArgs
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
        printed = fresh.run(script, str(tiny_llama_dir), env={"VLLM_PLUGINS": plugins})
        return printed.splitlines()[-3:]

    (with_plugin, modules, refusal), (without, none, unknown) = run("leank"), run("")
    assert with_plugin == without
    assert "vllm_leank.serving.plugin" in modules
    assert none == "[]"
    assert f"  leank mask calibrate {tiny_llama_dir} --bits 2 or name a mask file" in refusal
    assert "Unknown attention backend: 'LEANK'" in unknown
