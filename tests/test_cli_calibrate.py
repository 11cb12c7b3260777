"""`leank mask calibrate`: masks of bits and of pruned channels, and where they go."""

import json
import os
import re
import shlex

import numpy as np
import pytest
from typer.main import get_command

from vllm_leank import cli
from vllm_leank.cli.options import RECENT, SINK
from vllm_leank.core.options import Options
from vllm_leank.core.window import Window
from vllm_leank.learn.data import Data
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import load_mask
from vllm_leank.mask.folders import user_folder
from vllm_leank.mask.lookup import resolve_mask
from vllm_leank.mask.settings import plan_settings
from vllm_leank.offline.calibration_prompts import calibration_prompts
from vllm_leank.serving.serve_line import examine

SMALL = ["--sink", 32, "--recent", 32, "--device", "cpu"]


@pytest.mark.parametrize("bits", [4, 2])
def test_bits_from_built_in_prompts_end_in_a_mask_that_is_found_and_planned(
    leank, with_tokenizer, home, bits
):
    asked = ["--bits", bits, "--prompts", 4, "--max-tokens", 800, *SMALL]
    code, out, err = leank("mask", "calibrate", with_tokenizer, *asked)
    assert code == 0
    path = home / f"Tiny-1B-{bits}bit.yaml"
    assert str(path) in out
    assert "4 built-in prompts of" in err
    assert "tokens (at most 800, --max-tokens)" in err
    assert re.search(r"what each channel costs: about \d+ seconds more", err)
    mask = load_mask(path)
    assert mask.is_packed
    assert bits - 0.25 < mask.bits <= bits
    told = mask.provenance
    assert (told["method"], told["data"], told["bits"]) == ("calibrate", "built-in", bits)
    assert told["prompts"] == 4
    assert 750 < told["longest_prompt"] <= 800
    assert {"date", "torch", "transformers", "vllm_leank"} <= told.keys()
    assert resolve_mask(None, str(with_tokenizer), mask.geometry).sha256 == mask.sha256
    plan = plan_settings(mask, Options(), itemsize=2).plan
    assert plan.archive_token_bytes < plan.dense_token_bytes * (bits + 1) / 16
    smaller = plan.dense_token_bytes / plan.archive_token_bytes
    assert f"{smaller:.1f}x smaller than dense, scales included" in out
    code, _, err = leank("mask", "calibrate", with_tokenizer, *asked)
    assert code == 2
    assert "exists already" in err


def test_few_bits_of_own_prompts(leank, tiny_llama_dir, data, tmp_path):
    out = tmp_path / "m.yaml"
    asked = ["--bits", 0.75, "--data", data, "--out", out, *SMALL]
    assert leank("mask", "calibrate", tiny_llama_dir, *asked)[0] == 0
    assert 0.5 <= load_mask(out).bits <= 0.75
    assert len(load_mask(out).provenance["data_sha256"]) == 64


def test_prompts_of_a_file_are_counted_and_cut(leank, tiny_llama_dir, data, tmp_path):
    out = tmp_path / "m.yaml"
    asked = ["--bits", 8, "--data", data, "--max-prompts", 2, "--max-tokens", 400, "--out", out]
    assert leank("mask", "calibrate", tiny_llama_dir, *asked, *SMALL)[0] == 0
    told = load_mask(out).provenance
    assert (told["prompts"], told["tokens"], told["longest_prompt"]) == (2, 800, 400)


def test_a_second_mask_of_a_model_is_spoken_of(leank, tiny_llama_dir, data, home):
    def calibrate(bits):
        asked = ["--bits", bits, "--data", data, "--prompts", 1, "--model-id", "org/m", *SMALL]
        return leank("mask", "calibrate", tiny_llama_dir, *asked)

    code, out, err = calibrate(8)
    assert code == 0
    assert str(home / "org--m-8bit.yaml") in out
    assert "other masks" not in err
    code, _, err = calibrate(4)
    assert code == 0
    assert f"org/m has other masks, too: {home / 'org--m-8bit.yaml'}" in " ".join(err.split())


def test_built_in_prompts_that_a_model_cannot_read(leank, home, repo):
    model = repo / "benchmarks/recall/model"
    code, _, err = leank("mask", "calibrate", model, "--bits", 2, "--prompts", 1)
    assert code == 2
    assert "its tokenizer does not know the built-in prompts" in err
    assert "token 0; write prompts of the model's own kind to a file, and give it to" in err


def test_built_in_prompts_as_a_file(leank, with_tokenizer, tmp_path, repo):
    """Other commands take it, and see the prompts that they would have made."""
    out = tmp_path / "prompts.jsonl"
    asked = ["mask", "prompts", with_tokenizer, "--out", out, "--prompts", 5, "--max-tokens", 700]
    code, said, _ = leank(*asked)
    assert code == 0
    assert f"{out}: 5 prompts of up to " in said
    checkpoint = Checkpoint.open(str(with_tokenizer))
    window = Window(SINK, RECENT)
    built_in = calibration_prompts(checkpoint, None, window, max_tokens=700, count=5)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    whole = [line["prompt_token_ids"] + line["answer_token_ids"] for line in lines]
    assert whole == built_in.ids
    assert "import" in "".join(line["text"] for line in lines)
    assert calibration_prompts(checkpoint, out, window, max_tokens=700).ids == built_in.ids
    told = Data(out).open(checkpoint, Window(32, 64), seed=0)[2]
    assert (told["samples"], told["held_out"]) == (4, 1)
    assert leank(*asked)[0] == 2
    code, _, err = leank("mask", "prompts", repo / "benchmarks/recall/model", "--out", "x.jsonl")
    assert code == 2
    assert "its tokenizer does not know the built-in prompts" in err


def test_a_users_text_that_a_model_cannot_read(leank, home, repo, tmp_path):
    """Every command that reads prompts says so, before any work, with the line."""
    model, out = repo / "benchmarks/recall/model", tmp_path / "m.yaml"
    data = tmp_path / "words.jsonl"
    data.write_text('{"prompt": "An ordinary text, in English.", "answer": "Yes indeed"}\n')
    asked = [
        ["mask", "calibrate", model, "--bits", 2, "--data", data],
        ["mask", "calibrate", model, "--ratio", 0.7, "--data", data, "--out", out],
        ["mask", "learn", "--model", model, "--ratio", 0.7, "--data", data, "--out", out],
        ["mask", "heads", "--model", model, "--data", data],
        ["verify", model, "--data", data],
    ]
    for words in asked:
        code, _, err = leank(*words)
        assert code == 2, words
        assert f"{data}, line 1: the tokenizer of {model} does not know its words" in err
    learn = ["mask", "learn", model, "--ratio", 0.7, "--out", out]
    learn += ["--min-tokens", 1000, "--max-tokens", 2000]
    code, _, err = leank(*learn, "--from", "nothing")
    assert code == 2
    assert "generated samples: the tokenizer of" in err
    code, _, err = leank(*learn)
    assert code == 2
    assert "its tokenizer does not know the built-in prompts" in err


def test_a_config_that_is_overridden(leank, with_tokenizer, home, tmp_path):
    """What a server with the same flags takes, and the command that the advice names takes them."""
    yarn = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}}
    flag = ["--hf-overrides", json.dumps(yarn)]
    line = ["vllm", "serve", str(with_tokenizer), "--attention-backend", "leank", *flag]
    (reason,) = examine(line).reasons
    (advice,) = re.findall(r"leank mask calibrate .* --bits 2$", reason, re.MULTILINE)
    words = shlex.split(advice)
    assert words[3:6] == [str(with_tokenizer), *flag]
    context = get_command(cli.app)
    for word in words[1:3]:
        context = context.commands[word]
    assert context.make_context("calibrate", words[3:]).params["hf_overrides"] == yarn

    home.mkdir(parents=True)
    out = home / "m.yaml"
    assert leank("mask", "compose", "--model", with_tokenizer, *flag, "--out", out)[0] == 0
    assert load_mask(out).geometry.rope_scaling["rope_type"] == "yarn"
    assert examine(line).reasons == ()
    asked = ["plan", "--model", with_tokenizer, "--kv-cache-memory", "1GiB", "--max-model-len", 800]
    assert leank(*asked)[0] == 2
    code, said, _ = leank(*asked, *flag)
    assert code == 0
    assert shlex.join(flag) in said
    assert leank(*asked, "--hf-overrides", "[]")[0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", 0.5], "bits is 0.5; it must lie between 0.75 and 8"),
        (["--bits", 9], "it must lie between 0.75 and 8"),
        (["--bits", "nan"], "it must lie between 0.75 and 8"),
        ([], "give --bits, as in --bits 2"),
        (["--ratio", 0.7], "--ratio needs --out"),
        (["--bits", 2, "--score", "energy"], "goes with --ratio"),
        (["--bits", 2, "--align", 32], "--align goes with --ratio"),
        (["--bits", 2, "--model", "x"], "name one model"),
        (["--bits", 2, "--max-tokens", 300], "at least --max-tokens 608"),
        (["--bits", 2, "--streaming", 1.2], "streaming is 1.2; it must lie between 0"),
        (["--bits", 2, "--streaming", "nan"], "must lie between 0"),
        (["--bits", 2, "--streaming", 0.9], "leaves none of 4 heads"),
        (["--ratio", 0.7, "--streaming", -1, "--out", "m.yaml"], "streaming is -1"),
        (["--streaming", 0.5], "give --bits"),
    ],
)
def test_what_does_not_go_together(leank, with_tokenizer, home, options, message):
    code, _, err = leank("mask", "calibrate", with_tokenizer, *options)
    assert code == 2
    assert message in err
    assert not home.exists() or not os.listdir(home)


def test_the_longest_prompt_is_what_model_and_device_take(with_tokenizer):
    from vllm_leank.mask.checkpoint import Checkpoint
    from vllm_leank.offline.calibration_prompts import longest_prompt

    checkpoint = Checkpoint.open(str(with_tokenizer))  # takes 16,384 tokens
    assert longest_prompt(checkpoint, None, "cpu") == 2048
    assert longest_prompt(checkpoint, None, "cuda") == 16384
    assert longest_prompt(checkpoint, 100, "cuda") == 100


def test_the_users_folder(home, monkeypatch, tmp_path):
    assert user_folder() == home
    monkeypatch.setenv("HOME", str(tmp_path))
    for none in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", none)
        assert user_folder() == tmp_path / ".local/share/vllm-leank/masks"


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    lines = [json.dumps({"prompt_token_ids": rng.integers(0, 512, 600).tolist()}) for _ in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return tmp_path / "prompts.jsonl"


@pytest.mark.parametrize("score", ["fisher", "energy"])
def test_pruned_channels(leank, score, tiny_llama_dir, data, tmp_path):
    arguments = ["mask", "calibrate", "--model", tiny_llama_dir, "--data", data, "--ratio", 0.7]
    arguments += ["--score", score]
    options = ["--align", 16, "--sink", 32, "--recent", 128, "--device", "cpu"]
    out = tmp_path / "m.yaml"
    code, stdout, _ = leank(*arguments, *options, "--out", out, "--model-id", "leank/tiny")
    assert code == 0
    mask = load_mask(out)
    assert (mask.model, mask.align, mask.sink, mask.recent) == ("leank/tiny", 16, 32, 128)
    # 2 layers x 2 heads x 64 channels in groups of 16: 16 groups, of which 30% are 5.
    assert mask.kept_counts.sum() == 5 * 16
    assert "68.75% of K pruned (70.00% asked)" in stdout
    provenance = mask.provenance
    assert provenance["method"] == "calibrate"
    assert provenance["achieved"] == 0.6875
    assert (provenance["prompts"], provenance["tokens"]) == (4, 2400)
    assert provenance["data"] == "prompts.jsonl"
    assert leank(*arguments, "--out", out)[0] == 2
    code, _, _ = leank(
        *arguments, *options, "--out", out, "--model-id", "leank/tiny", "--overwrite"
    )
    assert code == 0
    assert load_mask(out).sha256 == mask.sha256
    # Fisher knows the means of what it prunes; energy leaves zeros.
    assert (mask.statistics is None) == (score == "energy")
    # A server takes it.
    assert plan_settings(mask, Options(), itemsize=2).plan.archive_format.name == "auto"


def test_prompts_without_far_tokens_are_left_out_and_not_counted(leank, tiny_llama_dir, tmp_path):
    """A mask's provenance is of what made it."""
    data, out = tmp_path / "mixed.jsonl", tmp_path / "m.yaml"
    data.write_text("".join(
        json.dumps({"prompt_token_ids": [7 + i % 50 for i in range(n)]}) + "\n"
        for n in (600, 100, 90)
    ))  # fmt: skip
    options = ["--data", data, "--bits", 4, "--sink", 32, "--recent", 128, "--device", "cpu"]
    code, _, err = leank("mask", "calibrate", tiny_llama_dir, *options, "--out", out)
    assert code == 0, err
    assert "2 of 3 prompts are too short for far tokens: left out" in err
    told = load_mask(out).provenance
    assert (told["prompts"], told["tokens"], told["longest_prompt"]) == (1, 600, 600)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--ratio", "1.5", "between 0 (keep all) and 1"),
        ("--align", "24", "multiple of 16"),
        ("--recent", "5", "at least 32"),
        ("--sink", "40", "multiple of 32"),
        ("--recent", "512", "no prompt has far tokens"),
        ("--dtype", "int8", "float32, bfloat16"),
        ("--device", "warp", "cannot be used"),
        ("--model", "/no/such/model", "no such directory"),
        ("--data", "/no/such/file", "No such file"),
        ("--model-id", "a b", "no model id"),
        ("--max-prompts", "0", "max-prompts"),
        ("--score", "norm", "allowed: fisher, energy"),
        ("--query-tokens", "16", "goes with --score energy"),
        ("--bits", "2", "exclude each other"),
        ("--streaming", "2", "must lie between 0"),
    ],
)
def test_bad_options_are_refused(leank, tiny_llama_dir, data, tmp_path, option, value, message):
    options = {"--model": tiny_llama_dir, "--data": data, "--ratio": 0.7, "--out": tmp_path / "m"}
    options[option] = value
    code, _, err = leank("mask", "calibrate", *(part for pair in options.items() for part in pair))
    assert code == 2
    assert message in err
    assert not (tmp_path / "m").exists()
