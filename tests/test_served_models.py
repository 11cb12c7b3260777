"""Startup and commands judge every architecture alike, as `docs/models.md` says."""

import json

import pytest
from architecture_configs import save_config
from architectures import NOT_LOOKED_AT, REFUSED, SAID_OF, names
from mask_samples import full_mask
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry
from vllm.plugins import load_general_plugins

from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import save_mask
from vllm_leank.serving.checks import RefusalError
from vllm_leank.serving.line import cause_of
from vllm_leank.serving.settings import load_settings

load_general_plugins()


@pytest.fixture(autouse=True)
def inspected_here(monkeypatch):
    """vLLM starts a process for each architecture to look at its code; here it is done at once."""
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())


def told_by_commands(model):
    """What commands that make masks, and `leank plan`, say against a model."""
    try:
        Checkpoint.open(str(model))
    except UserError as error:
        return str(error).removeprefix(f"{model}: leank cannot serve this model: ")
    return ""


def told_by_startup(model, options):
    """What startup and `leank doctor` say against it, and its config where they say nothing."""
    try:
        config = EngineArgs(
            model=str(model), skip_tokenizer_init=True, attention_backend="leank",
            additional_config={"leank": options}, enable_prefix_caching=False,
        ).create_engine_config()  # fmt: skip
    except Exception as error:
        if "failed to be inspected" in str(error):
            pytest.skip("vLLM cannot import the model's code here")
        refusal = cause_of(error)
        if not isinstance(refusal, RefusalError):
            raise
        other = "serve this model without --attention-backend leank"
        return "; ".join(refusal.reasons).replace(other, "use another model"), None
    return "", config


def some_short(values, every):
    """Parameters, of which one in so many is short."""
    return [
        value if index % every == 0 else pytest.param(value, marks=pytest.mark.long)
        for index, value in enumerate(values)
    ]


@pytest.mark.parametrize("architecture", some_short(names()[0], every=4))
def test_both_judge_alike(architecture, tmp_path):
    model = save_config(architecture, tmp_path)
    said, options = told_by_commands(model), {}
    if not said:
        save_mask(full_mask(model), tmp_path / "mask.yaml")
        options["mask"] = str(tmp_path / "mask.yaml")
    at_startup, config = told_by_startup(model, options)
    assert at_startup == said
    if architecture in REFUSED:
        assert SAID_OF[REFUSED[architecture]] in said
    elif architecture not in NOT_LOOKED_AT:
        assert not said
    if not said:
        geometry, served = load_settings(config).mask.geometry, config.model_config
        assert geometry.num_layers == served.get_total_num_hidden_layers()
        assert geometry.num_kv_heads == served.get_total_num_kv_heads()
        assert geometry.head_dim == served.get_head_size()


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("Gemma2ForCausalLM", "a logits soft cap is not supported, as no kernel here has one"),
        ("Gemma4ForCausalLM", "head size 512 is not a multiple of 32 up to 256, for which kernels"),
    ],
)
def test_large_heads_and_soft_caps_are_named_by_every_command(architecture, why, tmp_path, leank):
    model = save_config(architecture, tmp_path)
    line = ["vllm", "serve", model, "--attention-backend", "leank", "--skip-tokenizer-init"]
    code, out, _ = leank("doctor", "--json", "--", *line)
    assert code == 1
    reasons = json.loads(out)["serve"]["reasons"]
    assert any(why in one and "serve this model without --attention-b" in one for one in reasons)
    size = ("--kv-cache-memory", "1GiB", "--max-model-len", "1000", "--bits", "2")
    for command in (("plan", "--model", model, *size), ("mask", "calibrate", model, "--bits", "2")):
        code, _, err = leank(*command)
        assert code == 2
        assert why in err
