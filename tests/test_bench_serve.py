"""`leank bench serve`: what counts as steady, what variants are, and one real engine on CPU."""

import json
import subprocess
from typing import get_args

import pytest
from rich.console import Console

from vllm_leank.bench import serve
from vllm_leank.bench.report_serve import print_serve
from vllm_leank.bench.steady import FEWEST_STEPS, SteadyState, Step
from vllm_leank.errors import UserError


def decode(time, running, latency=0.01, waiting=0):
    latencies = (latency,) * running
    return Step(time, running, waiting, new_tokens=running, latencies=latencies)


def watch(*steps):
    state = SteadyState()
    for step in steps:
        state.add(step)
    return state


def test_steady_is_all_running_decode_and_no_prompt():
    state = watch(
        Step(1.0, 1),  # a chunk of a prompt
        Step(2.0, 2, prompt_tokens=100, new_tokens=1),  # which is complete now
        Step(3.0, 2, new_tokens=1),  # the other's first chunk
        Step(4.0, 2, prompt_tokens=100, new_tokens=2),
        decode(4.5, 2),
        decode(5.0, 2),
        Step(6.0, 3, new_tokens=2),
        Step(7.0, 3, prompt_tokens=100, new_tokens=3),
        decode(7.5, 3),
        decode(8.0, 3, latency=0.02),
        decode(8.5, 3),
    )
    stretch = state.best
    assert state.current is stretch
    assert (stretch.running, len(stretch.steps), stretch.begin, stretch.seconds) == (3, 3, 7.0, 1.5)
    assert stretch.tokens_per_s == 9 / 1.5
    assert stretch.latency_ms(50) == pytest.approx(10)
    assert stretch.latency_ms(99) == pytest.approx(20)
    assert state.peak == 3


def test_a_preemption_begins_another_stretch():
    state = watch(
        decode(1, 4),
        decode(2, 4),
        decode(3, 4),
        Step(4, 3, new_tokens=3, preempted=1),
        decode(5, 3),
    )
    assert (state.best.running, len(state.best.steps)) == (4, 3)
    assert (state.current.running, len(state.current.steps)) == (3, 2)
    assert (state.preempted, state.peak) == (1, 4)


def test_of_equally_long_stretches_the_fuller_counts():
    assert watch(decode(1, 4), Step(2, 5), decode(3, 5)).best.running == 5
    assert watch(decode(1, 5), Step(2, 5), decode(3, 4)).best.running == 5


@pytest.mark.parametrize("steps", [FEWEST_STEPS - 1, FEWEST_STEPS])
def test_a_full_engine_counts_and_not_who_is_left(steps):
    """Requests outgrow their room before many steps are over, and the fewer are left the longer
    they have room.
    """
    state = watch(*(decode(time, 48, waiting=9) for time in range(steps)))
    assert not state.settled(99)
    state.add(Step(steps, 47, 10, new_tokens=47, preempted=1))
    enough = steps == FEWEST_STEPS
    assert state.settled(99) == enough
    for time in range(98):
        state.add(decode(steps + 1 + time, 47, waiting=10))
    assert (state.best.running, len(state.best.steps)) == ((48, steps) if enough else (47, 99))
    assert state.settled(98)


def test_an_engine_that_nobody_waits_for_is_full_no_more():
    full = [decode(time, 9, waiting=1) for time in range(FEWEST_STEPS)]
    state = watch(*full, Step(98, 9, prompt_tokens=5, new_tokens=9), decode(99, 9))
    assert state.settled(99)
    assert state.best.steps == full


def test_without_steady_steps_there_is_none():
    assert not watch(Step(1, 1), Step(2, 1, prompt_tokens=9, new_tokens=1)).best.steps
    assert not watch(Step(1, 0)).best.steps


def test_variants():
    options = {"mask": "m.yaml", "sink": 64}
    assert serve.variant_args("flash", options) == {"attention_backend": "FLASH_ATTN"}
    assert serve.variant_args("flash-fp8", options)["kv_cache_dtype"] == "fp8"
    assert serve.variant_args("leank", options) == {
        "attention_backend": "leank",
        "additional_config": {"leank": options},
    }
    pruned = serve.variant_args("leank-pruned", options)["additional_config"]["leank"]
    assert pruned == {"mask": "m.yaml", "sink": 64, "prefill": "pruned"}
    assert serve.parse_variants("leank, flash") == ["leank", "flash"]


@pytest.mark.engine
def test_caches_are_of_vllm():
    """vLLM has them by these names, and does not ask for an attention backend's."""
    from vllm.config.cache import CacheDType

    assert set(serve.OTHER_CACHES) < set(get_args(CacheDType))
    for name in serve.OTHER_CACHES:
        assert serve.variant_args(name, {}) == {"kv_cache_dtype": name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "flash,fast"], "--variants has 'fast'; allowed: flash, flash-fp8"),
        (["--engine-args", "{"], "--engine-args is not JSON"),
        (["--engine-args", "[]"], "--engine-args is not a JSON object"),
        (["--mask", "/no/mask"], "cannot be read"),
        (["--pages", "5"], "pages is 5, but must be a share"),
        (["--pages", "inf"], "pages is inf, but must be a share"),
        (["--variants", "flash", "--sink", "64"], "--sink would change nothing"),
        (["--engine-args", '{"additional_config": {}}'], "has additional_config, which --variants"),
        (
            ["--engine-args", '{"model": "other"}'],
            "has model; give it as the command's own argument",
        ),
        (["--max-model-len", "32255"], "--max-model-len is 32255; prompts of 32000 tokens that"),
        (["--variants", "flash,leank-pruned", "--pages", "0.1"], "with prefill: exact alone"),
        (["--seed", "-1"], "greater than or equal to 0"),
        (["--out", "/no/such/folder/r.json"], "no such directory"),
    ],
)
def test_options_are_checked_before_an_engine_starts(leank, repo, options, message):
    code, _, err = leank("bench", "serve", repo / "benchmarks/recall/model", *options)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("cache", serve.OTHER_CACHES)
def test_caches_of_4_bits_are_refused_on_a_cpu(monkeypatch, cache):
    """vLLM would take them there, and make them 8-bit floats."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = f"--variants {cache} needs an NVIDIA GPU, and torch sees none"
    with pytest.raises(UserError, match=message):
        serve.parse_variants(f"flash,{cache}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert serve.parse_variants(f"flash,{cache}") == ["flash", cache]


def test_so_are_the_model_and_its_mask(leank, tiny_llama_dir):
    code, _, err = leank("bench", "serve", "/no/model")
    assert (code, err) == (2, "leank: /no/model: no such directory\n")
    code, _, err = leank("bench", "serve", tiny_llama_dir)
    assert code == 2
    assert f"leank mask calibrate {tiny_llama_dir} --bits 2" in err


def run_with(monkeypatch, returncode, result):
    def fake(command, **_):
        if result is not None:
            command[-1].write_text(json.dumps(result))
        return subprocess.CompletedProcess(command, returncode)

    monkeypatch.setattr(serve.subprocess, "run", fake)
    return serve.run_variant("leank", {})


def test_an_engine_that_fails_is_named(monkeypatch):
    with pytest.raises(UserError, match="leank: the engine ended with exit code 1; its log is"):
        run_with(monkeypatch, 1, None)
    with pytest.raises(UserError, match="leank: never steady"):
        run_with(monkeypatch, 0, {"error": "never steady"})
    assert run_with(monkeypatch, 0, {"concurrent": 3}) == {"variant": "leank", "concurrent": 3}


def figures(variant, concurrent, tokens_per_s, ttft, tpot, steps=256, waiting=9):
    decode = {"tokens_per_s": tokens_per_s, "tpot_p50_ms": tpot, "tpot_p99_ms": 2 * tpot}
    decode["steps"] = steps
    return {
        "variant": variant,
        "concurrent": concurrent,
        "waiting": waiting,
        "decode": decode,
        "engine": {"max_num_seqs": 1024},
        "ttft_s": {"median": ttft},
    }


def test_ratios_and_their_table(monkeypatch, capsys):
    monkeypatch.setattr(Console, "width", 80)
    variants = [figures("flash", 27, 1000.0, 1.0, 20.0), figures("leank", 54, 1500.0, 1.05, 10.0)]
    (ratio,) = ratios = serve.ratios(variants)
    assert ratio == {
        "variant": "leank",
        "against": "flash",
        "concurrent": 2,
        "tokens_per_s": 1.5,
        "ttft": 1.05,
        "tpot_p50": 0.5,
    }
    load = {"model": "m", "prompt_tokens": 32000, "steady_steps": 256, "num_prompts": 99}
    print_serve({"load": load, "variants": variants, "ratios": ratios})
    shown = capsys.readouterr().out
    for text in ("1,500", "(1.50x)", "(2.00x)", "54", "20.00", "32,000"):
        assert text in shown


def test_first_tokens_that_were_not_timed(capsys):
    variants = [figures(name, 1, 9.0, None, 8.0) for name in ("flash", "leank")]
    (ratio,) = ratios = serve.ratios(variants)
    assert (ratio["ttft"], ratio["tpot_p50"]) == (None, 1)
    load = {"model": "m", "prompt_tokens": 524000, "steady_steps": 256, "num_prompts": 9}
    print_serve({"load": load, "variants": variants, "ratios": ratios})
    assert " - " in capsys.readouterr().out


def test_the_table_says_where_an_engine_was_not_full_or_not_for_long(monkeypatch, capsys):
    monkeypatch.setattr(Console, "width", 100)
    variants = [
        figures("flash", 27, 1000.0, 1.0, 20.0),
        figures("flash-fp8", 48, 1000.0, 1.0, 20.0, steps=97),
        figures("int4_per_token_head", 48, 1000.0, 1.0, 20.0, steps=FEWEST_STEPS - 1),
        figures("turboquant_4bit_nc", 20, 1000.0, 1.0, 20.0, waiting=0),
        figures("leank", 99, 1500.0, 1.05, 10.0, waiting=0),
        figures("flash", 26, 900.0, 1.0, 20.0),
    ]
    load = {"model": "m", "prompt_tokens": 32000, "steady_steps": 256, "num_prompts": 99}
    print_serve({"load": load, "variants": variants, "ratios": serve.ratios(variants)})
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.endswith(
        "in brackets: against the first flash-fp8: full for 97 steps of the 256 asked for "
        "int4_per_token_head: 15 steps of the 256 asked for; more requests may fit "
        "turboquant_4bit_nc: nobody waited for room; more requests may fit "
        "leank: all prompts ran at once; more may fit: raise --num-prompts"
    )
    # Few steps, but all that were asked for; and as many requests as the engine takes.
    few = figures("flash", 8, 9.0, 1.0, 20.0, steps=8)
    most = figures("leank", 9, 9.0, 1.0, 20.0) | {"engine": {"max_num_seqs": 9}}
    of_few = {"load": load | {"steady_steps": 8}, "variants": [few, most]}
    print_serve(of_few | {"ratios": serve.ratios([few, most])})
    assert " ".join(capsys.readouterr().out.split()).endswith(
        "in brackets: against the first "
        "leank: as many as the engine may run; room may be left: raise max_num_seqs"
    )
    # The first has nothing to be compared with, though its variant was run again.
    assert shown.count("(0.96x)") == 1
    assert "1,000 1.000 20.00" in shown


def test_what_was_measured_is_shown_where_a_later_engine_fails(leank, repo, monkeypatch):
    shown = figures("flash", 2, 99.0, None, 1.0, steps=3)

    def run_variant(variant, run):
        if variant == "flash":
            return shown
        raise UserError(f"{variant}: no memory")

    monkeypatch.setattr(serve, "run_variant", run_variant)
    code, out, err = leank(
        *("bench", "serve", repo / "benchmarks/recall/model", "--variants", "flash,leank"),
        *("--mask", repo / "masks/leank/recall.yaml", "--prompt-tokens", 400),
        *("--output-tokens", 8),
    )
    assert code == 2
    assert "leank: no memory" in err
    assert "flash" in out
    assert "flash: 3 steps of the 8 asked for" in " ".join(out.split())


@pytest.mark.engine
def test_without_vllm(leank, monkeypatch):
    """One sentence that says what to install, before any work."""
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    code, out, err = leank("bench", "serve", "--model", "m")
    assert (code, out) == (2, "")
    assert "runs engines of vLLM: pip install 'vllm>=0.32.0,<0.34'" in err


@pytest.mark.long
def test_an_engine_on_cpu(leank, repo, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    engine_args = {"max_num_seqs": 3, "enforce_eager": True, "dtype": "float32"}
    code, out, err = leank(
        *("bench", "serve", "--variants", "leank-pruned"),
        *("--model", repo / "benchmarks/recall/model"),
        *("--mask", repo / "masks/leank/recall.yaml", "--sink", 64, "--recent", 128),
        *("--prompt-tokens", 400, "--output-tokens", 8, "--num-prompts", 5, "--lone-prompts", 1),
        *("--engine-args", json.dumps(engine_args), "--out", tmp_path / "r.json"),
    )
    assert code == 0, err
    results = json.loads((tmp_path / "r.json").read_text())
    (one,) = results["variants"]
    assert (one["variant"], one["concurrent"], one["waiting"], one["preempted"]) == (
        "leank-pruned",
        3,
        2,
        0,
    )
    assert one["decode"]["steps"] == 8
    # Two clocks: of outputs, and of tokens within the engine.
    per_step = 3 / one["decode"]["tokens_per_s"] * 1e3
    assert 0.3 * per_step < one["decode"]["tpot_p50_ms"] < 3 * per_step
    assert one["ttft_s"]["median"] > 0
    options = one["run"]["engine_args"]["additional_config"]["leank"]
    assert options["prefill"] == "pruned"
    assert options["recent"] == 128
    assert results["mask"]["model"] == "leank/recall"
    assert results["ratios"] == []
    assert "leank-pruned" in out
