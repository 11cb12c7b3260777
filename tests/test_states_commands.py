"""`leank plan`, `verify` and `serve` with models of which leank serves some layers alone: they say
what servers say, and the lines that they make work.
"""

import json
import shlex

import pytest
from byte_tokenizer import byte_tokenizer
from mask_samples import full_mask
from mixed_models import MODELS, save_mixed
from state_models import save_state

from vllm_leank.mask.file import save_mask
from vllm_leank.serving.serve_line import examine

FLAG = "--no-enable-prefix-caching"
SIZE = ("--kv-cache-memory", "1GiB", "--max-model-len", 4096)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """A model whose layers keep states, with a mask and a tokenizer."""
    return completed(save_state("granitemoehybrid", tmp_path_factory.mktemp("states")))


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    return completed(save_mixed(next(iter(MODELS)), tmp_path_factory.mktemp("sliding")))


def completed(model):
    save_mask(full_mask(model), model / "mask.yaml")
    byte_tokenizer().save_pretrained(model)
    return model


@pytest.mark.parametrize("model", ["states", "sliding"])
def test_commands_refuse_pruned_prompts_as_servers_do(leank, model, request):
    model = request.getfixturevalue(model)
    options = {"mask": str(model / "mask.yaml"), "prefill": "pruned"}
    given = ["--attention-backend", "leank", "--additional-config", json.dumps({"leank": options})]
    (reason,) = examine([str(model), *given, FLAG]).reasons
    asked = ["--model", model, "--mask", options["mask"], *SIZE]
    code, _, err = leank("plan", *asked, "--prefill", "pruned")
    assert code == 2
    assert reason in " ".join(err.split())
    assert leank("plan", *asked)[0] == 0
    code, _, err = leank("verify", model, "--mask", options["mask"], "--prefill", "pruned")
    assert code == 2
    assert reason in " ".join(err.split())


@pytest.mark.parametrize(("model", "told"), [("states", True), ("sliding", False)])
def test_the_line_of_a_plan_would_be_served(leank, model, told, request):
    model = request.getfixturevalue(model)
    code, out, _ = leank("plan", "--model", model, "--mask", model / "mask.yaml", *SIZE, "--json")
    assert code == 0
    leank_word, *words = shlex.split(json.loads(out)["serve"])
    assert (leank_word, FLAG in words) == ("leank", told)
    assert examine([*words, "--attention-backend", "leank"]).reasons == ()


def test_serve_adds_the_flag_that_states_need(leank, states, home, monkeypatch):
    """Before there is a mask as well, unless the user said something about prefix caching."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM"):  # the command sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    mask = json.dumps({"leank": {"mask": str(states / "mask.yaml")}})
    said = f"leank has no prefix caching for models with layers that keep states: adding {FLAG}"
    for more in ["--additional-config", mask], ["--bits", 2]:
        code, out, err = leank("serve", states, *more, "--dry-run")
        assert code == 0, err
        assert shlex.split(out).count(FLAG) == 1
        assert said in " ".join(err.split())
    code, out, err = leank("serve", states, "--additional-config", mask, FLAG, "--dry-run")
    assert (code, shlex.split(out).count(FLAG), "adding" in err) == (0, 1, False)
    asked = ["--additional-config", mask, "--enable-prefix-caching"]
    code, _, err = leank("serve", states, *asked, "--dry-run")
    assert code == 2
    assert f"add {FLAG}" in " ".join(err.split())
    assert not home.exists()
