"""`leank serve`: the line it runs, the mask it names or makes, and what it refuses before.

That the line serves, and answers, is in `test_serve.py`.
"""

import json
import os
import shlex
import sys
from dataclasses import replace

import pytest
from mask_samples import coded_mask
from vllm.engine.arg_utils import EngineArgs

from vllm_leank.mask.file import load_mask, save_mask
from vllm_leank.offline.progress import about
from vllm_leank.serving.line import read_line

YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}}


@pytest.fixture
def serve(leank, home, monkeypatch):
    """Run `leank serve`; its effect on the logs of this process's children ends with the test."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return lambda *args: leank("serve", *args)


@pytest.fixture
def own(with_tokenizer, home):
    """Give a function that puts a mask for the model into the user's folder, under its name."""
    home.mkdir(parents=True)

    def put(name, **provenance):
        mask = coded_mask(with_tokenizer)
        told = {"method": "calibrate", "data": "built-in", "longest_prompt": 2000} | provenance
        save_mask(replace(mask, model="Tiny-1B", provenance=told, sha256=""), home / name)
        return home / name

    return put


def options_of(line):
    """What `--additional-config` has in a line; no other one may be there."""
    words = shlex.split(line)
    (place,) = (i for i, word in enumerate(words) if word.startswith("--additional"))
    return json.loads(words[place + 1])


def test_the_line_before_there_is_a_mask(serve, with_tokenizer, home):
    """It is said what would be made, and nothing is."""
    flags = ["--served-model-name", "tiny", "-tp", "1", "--max-model-len", "4096", "--port=8001"]
    code, out, err = serve(with_tokenizer, *flags[:3], "--bits", 2, *flags[3:], "--dry-run")
    assert code == 0, err
    mask = json.dumps({"leank": {"mask": str(home / "Tiny-1B-2bit.yaml")}})
    words = ["vllm", "serve", str(with_tokenizer), *flags, "--attention-backend", "leank"]
    assert shlex.split(out) == [*words, "--additional-config", mask]
    assert "no mask of 2 bits for Tiny-1B is found: one would be calibrated first" in err
    assert not home.exists()


def test_prompts_for_a_mask_that_is_not_made_are_told_of(serve, with_tokenizer, own, tmp_path):
    data = tmp_path / "prompts.jsonl"
    code, _, err = serve(with_tokenizer, "--bits", 2, "--data", data, "--dry-run")
    assert code == 2
    assert f"{data}: no such file; --data has the prompts for a new mask" in err
    code, _, err = serve(with_tokenizer, "--data", data, "--prompts", 3, "--dry-run")
    assert code == 2
    assert "--data and --prompts: for a mask that --bits makes; give --bits as well" in err
    path = own("mine.yaml", bits=2)
    line = [with_tokenizer, "--bits", 2, "--max-model-len", 2048, "--prompts", 3, "--dry-run"]
    code, _, err = serve(*line)
    assert code == 0, err
    assert f"{path}: is served as it is; --prompts: for a new mask, not read" in err


def test_a_mask_that_is_found_is_named(serve, with_tokenizer, own):
    own("other.yaml", bits=4)
    path = own("mine.yaml", bits=2)
    code, out, err = serve(with_tokenizer, "--bits", 2, "--max-model-len", 2048, "--dry-run")
    assert code == 0, err
    assert options_of(out) == {"leank": {"mask": str(path)}}
    assert "would be calibrated" not in err
    # Where a file has the name already, a new mask gets another.
    own("Tiny-1B-8bit.yaml", bits=3)
    code, out, _ = serve(with_tokenizer, "--bits", 8, "--dry-run")
    assert options_of(out)["leank"]["mask"] == str(path.with_name("Tiny-1B-8bit-2.yaml"))


def test_a_cpu_is_told_how_much_its_cache_takes(serve, with_tokenizer, own, monkeypatch, tmp_path):
    """vLLM would ask for nearly all memory of the machine, and not start where that is not free."""
    own("mine.yaml", bits=2)
    flag = ["--kv-cache-memory-bytes", "4G"]
    file = tmp_path / "config.yaml"
    file.write_text("gpu-memory-utilization: 0.5\n")
    default = EngineArgs.gpu_memory_utilization
    for more, told in (
        ([], False),
        (flag, True),
        (["--gpu-memory-utilization", "0.5"], True),
        ([f"--gpu_memory_utilization={default}"], True),
        (["--config", file], True),
    ):
        monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
        code, out, err = serve(with_tokenizer, *more, "--dry-run")
        assert code == 0, err
        assert (shlex.split(out)[-2:] == flag) == (not told)


@pytest.mark.parametrize(
    ("length", "provenance", "again"),
    [
        (800, {}, False),
        (2048, {}, True),
        (16384, {}, True),
        (2048, {"data": "mine.jsonl"}, False),
        (2048, {"method": "compose"}, False),
        (16384, {"longest_prompt": 2000}, False),
        (700, {"longest_prompt": 600, "max_tokens": 700}, False),
    ],
)
def test_a_mask_of_shorter_prompts_is_made_again(
    serve, with_tokenizer, own, length, provenance, again
):
    """As long as that is the same work over longer ones, which on a CPU end at 2,048 tokens."""
    path = own("mine.yaml", **{"bits": 2, "longest_prompt": 750} | provenance)
    flags = ["--max-model-len", length, "--dry-run"]
    code, out, err = serve(with_tokenizer, "--bits", 2, *flags)
    assert code == 0, err
    assert options_of(out) == {"leank": {"mask": str(path)}}
    words = f"{path}: made from prompts of up to 750 tokens, and requests may be longer: one would"
    assert (words in err) == again


def test_without_bits_the_mask_is_looked_up(serve, with_tokenizer, own):
    flags = ["--dry-run", "--additional-config", '{"leank": {"sink": 32}}']
    code, _, err = serve(with_tokenizer, *flags)
    assert code == 2
    assert f"\n  leank mask calibrate {with_tokenizer} --bits 2\n" in err
    own("mine.yaml", bits=2)
    code, out, err = serve(with_tokenizer, *flags)
    assert code == 0, err
    words = ["vllm", "serve", str(with_tokenizer), *flags[1:], "--attention-backend", "leank"]
    assert shlex.split(out) == words
    own("second.yaml", bits=4)
    code, _, err = serve(with_tokenizer, *flags)
    assert code == 2
    assert "several masks fit" in err


@pytest.mark.parametrize(
    "flags",
    [
        ["--additional-config", '{"leank": {"sink": 32}, "other": [1]}'],
        ["--additional_config", '{"leank": {"sink": 32}, "other": [1]}'],
        ['--additional-config={"leank": {"sink": 32}, "other": [1]}'],
        ["--additional-config.leank.sink", "32", "--additional_config.other+=1"],
        ["--additional-config.leank.sink=32", "--additional-config.other", "[1]"],
    ],
)
def test_options_that_are_given_stay(serve, with_tokenizer, flags):
    line = [with_tokenizer, *flags, "--bits", 2, "--port", "8001", "--dry-run"]
    code, out, err = serve(*line)
    assert code == 0, err
    given = options_of(out)
    assert given["leank"].pop("mask").endswith("Tiny-1B-2bit.yaml")
    assert (given["leank"], len(given["other"])) == ({"sink": 32}, 1)
    assert shlex.split(out)[3:5] == ["--port", "8001"]


def test_flags_of_a_file_count(serve, with_tokenizer, tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text(
        f"model: {with_tokenizer}\nadditional-config:\n  leank:\n    sink: 32\n"
        "attention-backend: leank\n"
    )
    code, out, err = serve("--config", file, "--bits", 2, "--dry-run")
    assert code == 0, err
    assert shlex.split(out)[:4] == ["vllm", "serve", "--config", str(file)]
    assert options_of(out)["leank"]["sink"] == 32
    assert "--attention-backend" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", 9], "bits is 9; it must lie between 0.75 and 8"),
        (["--attention-backend", "FLASH_ATTN"], "but FLASH_ATTN is asked for: remove that"),
        (["--attention-config.backend", "TRITON_ATTN"], "but TRITON_ATTN is asked for"),
        (["--additional-config", "[1]"], "--additional-config is '[1]', but must be a JSON"),
        (["--additional-config.leank.mask", "m.yaml"], "names one, m.yaml: give one of both"),
        (["--additional-config.leank.sinks", "3"], 'leank has no option "sinks"'),
        (
            ["--additional-config.leank.archive_dtype", "fp8"],
            "archive_dtype is no more: remove it; ",
        ),
        (["--block-size", "32", "--kv-cache-dtype", "fp8"], "remove the flag"),
        (["--max-model-len", "many"], "vLLM refuses it: argument --max-model-len"),
        (["--no-such-flag"], "vLLM refuses it: unrecognized arguments: --no-such-flag"),
        (["more"], "is no MODEL"),
        (["--max-model-len", "4096", "--kv-cache-memory-bytes", "100K"], "4,096 tokens needs"),
    ],
)
def test_what_is_refused_before_anything_is_made(
    serve, with_tokenizer, home, flags, message, monkeypatch
):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # which counts more than the flag
    code, out, err = serve(with_tokenizer, "--bits", 2, *flags)
    assert code == 2
    assert message in err
    assert (out, home.exists()) == ("", False)


def test_a_model_must_be_named(serve):
    code, _, err = serve("--port", "8001", "--bits", 2)
    assert code == 2
    assert "name a model: leank serve MODEL --bits 2" in err
    assert serve("--bits", 2)[0] == 2
    assert "/no/such: no such directory" in serve("/no/such", "--bits", 2)[2]


def test_two_masks_of_the_same_bits(serve, with_tokenizer, own):
    paths = [own(name, bits=2) for name in ("a.yaml", "b.yaml")]
    code, _, err = serve(with_tokenizer, "--bits", 2, "--dry-run")
    assert code == 2
    assert f"several masks of 2 bits fit {with_tokenizer}: {paths[0]}, {paths[1]}" in err


def test_a_mask_is_made_of_the_model_that_is_served(serve, with_tokenizer, home, monkeypatch):
    """Of this revision, with overrides of its config, for this window, as long as requests; then
    vLLM takes this process's place, with the environment as it was.
    """
    started = []
    monkeypatch.setattr(os, "execve", lambda *args: started.append(args))
    before = dict(os.environ)
    flags = ["--max-model-len", 700, "--revision", "v2", "--hf-overrides", json.dumps(YARN)]
    flags += ["--bits", 4, "--additional-config.leank.recent", 128]
    code, out, err = serve(with_tokenizer, "--prompts", 2, *flags)
    assert code == 0, err
    path = home / "Tiny-1B-4bit.yaml"
    assert f"{path}: 4.00 bits" in out
    mask = load_mask(path)
    assert mask.geometry.rope_scaling["rope_type"] == "yarn"
    assert (mask.sink, mask.recent) == (64, 128)
    told = mask.provenance
    assert (told["bits"], told["prompts"], told["revision"]) == (4, 2, "v2")
    assert 600 < told["longest_prompt"] <= told["max_tokens"] == 700

    ((program, command, environment),) = started
    assert program == sys.executable
    assert command[:5] == [program, "-P", "-m", "vllm.entrypoints.cli.main", "serve"]
    assert environment == before
    assert read_line(command[4:]).options.mask == str(path)

    # The model as it is, or another revision of it, is another one.
    flags += ["--dry-run"]
    assert "would be calibrated" not in serve(with_tokenizer, *flags)[2]
    for place in (2, 4):
        others = flags[:place] + flags[place + 2 :]
        code, out, err = serve(with_tokenizer, *others)
        assert code == 0, err
        assert "would be calibrated" in err
        assert options_of(out)["leank"]["mask"] == str(home / "Tiny-1B-4bit-2.yaml")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (1, "about 10 seconds"),
        (44, "about 40 seconds"),
        (119, "about 120 seconds"),
        (170, "about 3 minutes"),
        (7199, "about 120 minutes"),
        (9000, "about 2 hours"),
    ],
)
def test_how_long_it_takes(seconds, words):
    assert about(seconds) == words
