"""`leank doctor`: what it finds where it runs, and what it says of a `vllm serve` line."""

import importlib.metadata
import json
import re
from dataclasses import replace
from types import FunctionType, SimpleNamespace

import pytest
import torch
from mask_samples import full_mask, random_mask
from vllm.engine import arg_utils
from vllm.platforms.interface import DeviceCapability
from vllm.plugins import load_general_plugins

from vllm_leank.core.capacity import OTHER_BYTES
from vllm_leank.core.window import Window
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import load_mask, save_mask
from vllm_leank.serving import checks
from vllm_leank.serving.environment import environment
from vllm_leank.serving.serve_line import _pool, examine
from vllm_leank.serving.vllm import backend_name, versions
from vllm_leank.version import __version__

load_general_plugins()


@pytest.fixture
def line(tiny_llama_dir, tmp_path):
    """Give a function that makes a `vllm serve` line with flags and leank options."""
    save_mask(random_mask(tiny_llama_dir, [32, 0]), tmp_path / "mask.yaml")

    def make(*flags, **options):
        options = {"mask": str(tmp_path / "mask.yaml")} | options
        chosen = ["--attention-backend", "leank", "--skip-tokenizer-init"]
        given = ["--additional-config", json.dumps({"leank": options})]
        return ["vllm", "serve", str(tiny_llama_dir), *chosen, *given, *flags]

    return make


def test_everything_is_in_place_here():
    facts = {fact.name: fact for fact in environment()}
    assert [fact for fact in facts.values() if fact.problem] == []
    assert facts["vllm"].value.startswith(("0.32", "0.33"))
    assert facts["plugin"].value == "vllm_leank.serving.plugin:register"
    assert facts["backend"].value == "LEANK"


def test_two_copies_of_the_package(repo, tmp_path, monkeypatch):
    """One of which, say of an older wheel, hides the other, whichever comes first."""
    facts = {fact.name: fact for fact in environment()}
    assert facts["vllm-leank"].value == f"{__version__}, {repo / 'vllm_leank'}"
    (tmp_path / "vllm_leank").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert problem_of("vllm-leank") is None  # an empty folder is no package
    (tmp_path / "vllm_leank/__init__.py").touch()
    assert f"there is another copy: {tmp_path / 'vllm_leank'}" in problem_of("vllm-leank")


def test_without_a_line_nothing_is_wrapped_and_vllm_is_not_asked(leank, monkeypatch):
    """Lines of a file are whole, however narrow a terminal is."""
    monkeypatch.setenv("COLUMNS", "20")
    code, out, _ = leank("doctor")
    assert code == 0
    assert re.search(r"^ok  device +CPU, ", out, re.MULTILINE)
    assert "vllm_leank.serving.plugin:register" in out
    assert "a line to look at as well: leank doctor -- vllm serve MODEL" in out
    assert "backend" not in out


def test_the_device_without_vllm(monkeypatch, tmp_path):
    """As the driver tells it, where vLLM's build is for GPUs."""
    monkeypatch.setattr(versions, "vllm_version", lambda: "0.33.0")
    monkeypatch.setattr("vllm_leank.serving.environment._version", lambda name: None)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    facts = {fact.name: fact for fact in environment(with_vllm=False)}
    assert facts["device"].value == "NVIDIA H100 80GB HBM3, capability 9.0"
    assert facts["device"].problem is None
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    facts = {fact.name: fact for fact in environment(with_vllm=False)}
    assert "nvidia-smi finds no GPU" in facts["device"].problem


def problem_of(name):
    return {fact.name: fact.problem for fact in environment()}[name]


def test_a_plugin_that_vllm_leaves_out(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert problem_of("plugin") == "VLLM_PLUGINS='other' leaves it out: add leank"
    monkeypatch.setenv("VLLM_PLUGINS", "other,leank")
    assert problem_of("plugin") is None


def test_a_plugin_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    assert "not installed where vLLM is" in problem_of("plugin")


def test_a_backend_that_is_not_registered(monkeypatch):
    monkeypatch.setattr(backend_name, "BACKEND", "NONE")
    assert "did not register" in problem_of("backend")


@pytest.mark.parametrize("installed", ["0.31.2", "0.34.0rc1", "0.34.0+cpu", "0.99.0"])
def test_another_vllm(monkeypatch, installed):
    monkeypatch.setattr(versions, "vllm_version", lambda: installed)
    problem = f"vllm-leank works with vLLM >=0.32.0,<0.34, but {installed} is installed"
    assert problem in problem_of("vllm")


@pytest.mark.parametrize("installed", ["0.32.0+cpu", "0.32.1", "0.33.0", "0.33.1rc1"])
def test_a_vllm_that_is_supported(monkeypatch, installed):
    monkeypatch.setattr(versions, "vllm_version", lambda: installed)
    assert problem_of("vllm") is None


def test_no_vllm(monkeypatch, leank):
    monkeypatch.setattr(versions, "vllm_version", lambda: None)
    assert "not installed" in problem_of("vllm")
    assert [fact.name for fact in environment()][-1] == "vllm"
    assert leank("doctor", "--", "serve", "m")[0] == 1


def test_a_line_that_would_be_served(line, tmp_path):
    serving = examine(line("--max-model-len", "4096", "--kv-cache-memory-bytes", "1G", sink=0))
    assert serving.reasons == ()
    assert serving.settings.mask.sha256 == load_mask(tmp_path / "mask.yaml").sha256
    assert serving.settings.window == Window(0, 256)
    assert (serving.length, serving.pool_bytes) == (4096, 2**30)


def test_every_reason_at_once_and_the_plan_all_the_same(line):
    flags = ["--block-size", "32", "--kv-cache-dtype", "fp8", "--disable-hybrid-kv-cache-manager"]
    serving = examine(line(*flags))
    assert len(serving.reasons) == 3
    for flag in ("--kv-cache-dtype bfloat16", flags[0], flags[-1]):
        assert any(flag in reason for reason in serving.reasons)
    assert serving.settings.window == Window(64, 256)


def test_faulty_options_beside_faulty_flags(line):
    serving = examine(line("--block-size", "32", sinks=64))
    assert len(serving.reasons) == 2
    assert 'no option "sinks"' in serving.reasons[0]
    assert serving.settings is None


def test_a_missing_mask_beside_faulty_flags(line):
    serving = examine(line("--block-size", "32", mask="/no/such.yaml"))
    assert len(serving.reasons) == 2
    assert "/no/such.yaml: cannot be read" in serving.reasons[1]
    (reason,) = examine(line(mask="/no/such.yaml")).reasons
    assert reason.startswith("/no/such.yaml: cannot be read")


def test_a_faulty_mask(line, tmp_path):
    (tmp_path / "mask.yaml").write_text("format: leank-mask/1\nmodel: tests/tiny\nkeep: all\n")
    (reason,) = examine(line()).reasons
    assert reason.startswith(f"{tmp_path / 'mask.yaml'}, line 3: keep")


def test_no_mask(tiny_llama_dir):
    (reason,) = examine(["serve", str(tiny_llama_dir), "--attention-backend", "leank"]).reasons
    assert f"\n  leank mask calibrate {tiny_llama_dir} --bits 2\n" in reason


def test_one_fault_hides_no_other(line):
    """Of flags, options, mask and drafts."""
    drafts = '{"method": "ngram", "num_speculative_tokens": 300}'
    flags = ["--block-size", "32", "--speculative-config", drafts]
    wanted = "sink is 30", "prefill = 'x'", 'no option "sinks"', "--block-size", "the 300 of"
    reasons = examine(line(*flags, sink=30, sinks=3, prefill="x")).reasons
    assert len(reasons) == len(wanted)
    assert all(any(part in reason for reason in reasons) for part in wanted)
    reasons = examine(line(*flags, sink=30, recent=5, mask="/no/such.yaml")).reasons
    wanted = "sink is 30", "recent is 5", "--block-size", "/no/such.yaml: cannot be read"
    assert len(reasons) == len(wanted)
    assert all(any(part in reason for reason in reasons) for part in wanted)


def test_a_pool_that_holds_no_request_of_full_length(line, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # which counts more than the flag
    length = ["--max-model-len", "4096"]
    (reason,) = examine(line(*length, "--kv-cache-memory-bytes", "1M")).reasons
    assert "a request of 4,096 tokens needs" in reason
    needed = int(re.search(r"needs ([\d,]+) bytes", reason)[1].replace(",", ""))
    assert len(examine(line(*length, "--kv-cache-memory-bytes", str(needed - 1))).reasons) == 1
    assert examine(line(*length, "--kv-cache-memory-bytes", str(needed))).reasons == ()
    fitted = examine(line("--max-model-len", "auto", "--kv-cache-memory-bytes", "1M"))
    assert fitted.reasons == ()


def test_lines_that_do_not_choose_leank(tiny_llama_dir):
    plain = [str(tiny_llama_dir), "--skip-tokenizer-init"]
    (reason,) = examine(plain).reasons
    assert reason == "leank is not selected: add --attention-backend leank"
    (reason,) = examine([*plain, "--additional-config", '{"leank": {}}']).reasons
    assert reason.startswith("leank options are given, but leank is not selected")


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        (["vllm", "bench", "serve"], "bench serve"),
        (["foo", "bar"], "foo bar"),
        (["VLLM_X=1", "vllm", "serve", "m"], "VLLM_X=1 vllm serve m"),
        (["vllm", "serve", "m", "n"], "m n"),
    ],
)
def test_lines_that_are_not_of_vllm_serve(words, taken):
    (reason,) = examine([*words, "--attention-backend", "leank"]).reasons
    assert reason == f"expected `vllm serve MODEL` and flags, but `{taken}` is no MODEL"


def test_a_line_of_leank_looks_at_itself():
    (reason,) = examine(["leank", "serve", "m", "--bits", "2"]).reasons
    assert "run it with --dry-run, and it says what it would serve" in reason


def test_the_words_vllm_serve_may_be_left_out(line):
    for skipped in (1, 2):
        assert examine(line()[skipped:]).reasons == ()


@pytest.mark.parametrize("model", ["/nope", "./no/such", "~/nope"])
def test_a_path_to_nothing(line, model):
    given = line()
    given[2] = model
    assert examine(given).reasons == (f"{model}: no such directory",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--additional-config", "{bad}"], "Value {bad} cannot be converted to JSON"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--max-model-len", "many"], "--max-model-len"),
        (["--max-model-len", "1000000"], "max_model_len"),
        (["--enable-auto-tool-choice"], "requires --tool-call-parser"),
    ],
)
def test_what_vllm_itself_refuses(line, flags, message):
    (reason,) = examine(line(*flags)).reasons
    assert reason.startswith("vLLM refuses it: ")
    assert message in reason


@pytest.mark.parametrize("fault", [TypeError, KeyError, ValueError, AssertionError])
def test_a_fault_of_leank_is_not_called_a_refusal(line, monkeypatch, fault):
    """It is raised, with its traceback, also where vLLM has wrapped it."""

    def faulty(*_):
        raise fault("of leank")

    faulty = FunctionType(faulty.__code__, vars(checks), closure=faulty.__closure__)
    monkeypatch.setattr(checks, "_flags", faulty)
    with pytest.raises(fault, match="of leank"):
        examine(line())


def test_what_vllm_stumbles_over_is_its_refusal(line, monkeypatch):
    def stumbles(*_):
        raise TypeError("of vLLM")

    stumbles = FunctionType(stumbles.__code__, vars(arg_utils))
    monkeypatch.setattr(arg_utils.EngineArgs, "create_model_config", stumbles)
    assert examine(line()).reasons == ("vLLM refuses it: TypeError: of vLLM",)


@pytest.fixture
def gpu(monkeypatch):
    """What vLLM says where there is a GPU of 80 GiB."""
    platform = SimpleNamespace(
        is_cpu=lambda: False,
        is_cuda=lambda: True,
        get_device_name=lambda: "NVIDIA Fast",
        get_device_capability=lambda: DeviceCapability(9, 0),
        get_device_total_memory=lambda: 80 * 2**30,
    )
    monkeypatch.setattr("vllm.platforms.current_platform", platform)


def test_a_gpu_is_named(gpu):
    device = next(fact for fact in environment() if fact.name == "device")
    assert (device.value, device.problem) == ("NVIDIA Fast, capability 9.0", None)


def test_the_pool_of_a_gpu_is_estimated(gpu, repo):
    model = SimpleNamespace(model=str(repo / "benchmarks/recall/model"), dtype=torch.bfloat16)
    cache = SimpleNamespace(kv_cache_memory_bytes=None, gpu_memory_utilization=0.5)
    config = SimpleNamespace(
        model_config=model,
        cache_config=cache,
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
    )
    weights = Checkpoint.open(model.model).weight_bytes(2)
    assert _pool(config) == 40 * 2**30 - weights - OTHER_BYTES
    config.parallel_config.pipeline_parallel_size = 2
    assert _pool(config) == 2 * (40 * 2**30 - weights // 2 - OTHER_BYTES)
    cache.gpu_memory_utilization = 0.01
    assert _pool(config) is None


def test_neither_a_gpu_nor_vllm_for_cpu(monkeypatch):
    nowhere = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False, device_name="")
    monkeypatch.setattr("vllm.platforms.current_platform", nowhere)
    assert "vLLM finds neither" in problem_of("device")


@pytest.fixture
def doctor(leank, monkeypatch):
    """`leank doctor` without its effect on the logs of this process's children."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    return lambda *args: leank("doctor", *args)


def test_doctor_of_a_good_line(doctor, line):
    flags = ["--max-model-len", "8192", "--kv-cache-memory-bytes", "1G"]
    code, out, _ = doctor("--json", "--", *line(*flags))
    assert code == 0
    found = json.loads(out)
    assert found["ok"]
    assert found["serve"]["plan"]["archive_format"] == "auto"
    assert len(found["serve"]["engines"]) == 3
    code, out, _ = doctor("--", *line(*flags))
    assert code == 0
    told = " ".join(out.split())
    assert "leank would serve this line" in told
    assert "leank window: sink 64, recent 256 tokens dense" in told
    assert "requests of 8,192 tokens that fit" in told


def test_doctor_of_a_line_that_only_leank_serves(doctor, line, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    flags = ["--max-model-len", "8192", "--max-num-batched-tokens", "512"]
    args = line(*flags, "--kv-cache-memory-bytes", "7M", prefill="pruned")
    code, out, _ = doctor("--", *args)
    assert code == 0
    assert "leank would serve this line" in out
    assert "fits with leank; without it vLLM would not start, as it does not fit: vLLM." in out
    assert "more memory" not in out


def test_texts_of_masks_steer_no_terminal(doctor, tiny_llama_dir, tmp_path):
    """Nor are they markup."""
    path = tmp_path / "m.yaml"
    evil = "FAIL: \x1b[2J\x9b[bold]x[/nothing]\n\u202e:smile:"
    mask = replace(full_mask(tiny_llama_dir), sha256="", evaluation={"verify": evil})
    save_mask(replace(mask, provenance={"method": evil}, sha256=""), path)
    options = json.dumps({"leank": {"mask": str(path)}})
    args = ["vllm", "serve", tiny_llama_dir, "--attention-backend", "leank"]
    args += ["--additional-config", options, "--max-model-len", "2048"]
    code, out, _ = doctor("--", *args)
    assert code == 0
    assert out.replace("\n", "").isprintable()
    assert out.count(r"FAIL: \x1b[2J\x9b[bold]x[/nothing]\n\u202e:smile:") == 2
    path.write_text(f"format: leank-mask/1\n{json.dumps(evil)}: 1\n")
    code, out, _ = doctor("--", *args)
    assert code == 1
    assert out.replace("\n", "").isprintable()
    assert r"\x1b[2J\x9b[bold]x[/nothing]\n\u202e:smile:: unknown key" in out


def test_doctor_of_a_line_that_would_be_refused(doctor, line):
    args = line("--block-size", "32", "--disable-hybrid-kv-cache-manager")
    code, out, _ = doctor("--", *args)
    assert code == 1
    told = " ".join(out.split())
    assert "leank would not serve this line: * --block-size follows from the mask" in told
    assert "remove --disable-hybrid-kv-cache-manager" in told
    assert "leank mask: tests/tiny" in told
    code, out, _ = doctor("--json", "--", *args)
    assert code == 1
    found = json.loads(out)
    assert not found["ok"]
    assert len(found["serve"]["reasons"]) == 2


def test_doctor_without_a_line(doctor):
    code, out, _ = doctor("--json")
    assert code == 0
    assert json.loads(out)["serve"] is None
    code, out, _ = doctor()
    assert code == 0
    assert "vllm_leank.serving.plugin:register" in out


@pytest.mark.parametrize(("length", "warned"), [(4400, False), (8192, True)])
def test_requests_longer_than_a_masks_prompts(doctor, tiny_llama_dir, tmp_path, length, warned):
    mask = full_mask(tiny_llama_dir)
    provenance = {"method": "calibrate", "longest_prompt": 4000}
    save_mask(replace(mask, provenance=provenance, sha256=""), tmp_path / "short.yaml")
    options = json.dumps({"leank": {"mask": str(tmp_path / "short.yaml")}})
    args = ["vllm", "serve", tiny_llama_dir, "--attention-backend", "leank"]
    args += ["--additional-config", options, "--max-model-len", length]
    code, out, _ = doctor("--", *args)
    assert code == 0
    words = "made from prompts of up to 4,000 tokens, but requests may have 8,192"
    assert (words in " ".join(out.split())) == warned
    code, out, _ = doctor("--json", "--", *args)
    assert len(json.loads(out)["serve"]["warnings"]) == warned


@pytest.mark.parametrize(("verdict", "warned"), [("PASS: all", False), ("FAIL: top-1", True)])
def test_a_mask_that_failed_verify(doctor, tiny_llama_dir, tmp_path, verdict, warned):
    mask = replace(full_mask(tiny_llama_dir), evaluation={"verify": verdict}, sha256="")
    save_mask(mask, tmp_path / "judged.yaml")
    options = json.dumps({"leank": {"mask": str(tmp_path / "judged.yaml")}})
    args = ["vllm", "serve", tiny_llama_dir, "--attention-backend", "leank"]
    args += ["--additional-config", options, "--max-model-len", "2048"]
    code, out, _ = doctor("--", *args)
    assert code == 0
    words = f"it failed `leank verify`, as its file says ({verdict})"
    assert (words in " ".join(out.split())) == warned
    code, out, _ = doctor("--json", "--", *args)
    assert len(json.loads(out)["serve"]["warnings"]) == warned
