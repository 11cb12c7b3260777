"""`leank plan`: what fits, from the pages that a server uses."""

import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from archive_definition import plan_of
from mask_samples import random_mask
from recall.demo import MODEL
from rich.console import Console

from vllm_leank.cli.capacity_table import capacity_table
from vllm_leank.cli.sizes import readable
from vllm_leank.core.capacity import Capacity, leank_capacity
from vllm_leank.core.formats.packed import CODE_CLASSES
from vllm_leank.core.geometry import Geometry
from vllm_leank.core.hf_config import longest_request
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.file import save_mask
from vllm_leank.mask.lookup import find_masks
from vllm_leank.mask.plain_config import count_weights, plain_config
from vllm_leank.offline.allocate import class_widths
from vllm_leank.offline.even_bits import even_bits

(BUNDLED,) = find_masks("leank/recall")


@pytest.fixture
def recall(leank, repo):
    """`leank plan` for the bundled model and its mask."""

    def run(*args):
        return leank("plan", "--model", repo / "benchmarks/recall/model", *args)

    return run


def test_plan_says_what_a_server_says(recall):
    """The README has the startup reports of this model."""
    code, out, _ = recall("--kv-cache-memory", "1GiB", "--max-model-len", 8256, "--json")
    assert code == 0
    planned = json.loads(out)
    assert planned["pool_bytes"] == 2**30
    assert planned["window"] == {"sink": 64, "recent": 256}
    engines = {engine["name"]: engine for engine in planned["engines"]}
    assert [
        (name, engine["far_token_bytes"], engine["archive_block"], round(engine["at_once"], 1))
        for name, engine in engines.items()
    ] == [
        ("vLLM", 6144, None, 21.2),
        ("vLLM, fp8 cache", 3072, None, 42.3),
        ("leank", 2432, 96, 46.3),
    ]
    assert round(engines["leank"]["ratio_at_once"], 2) == 2.19
    assert round(engines["leank"]["in_decode"], 1) == 48.9
    assert round(engines["leank"]["ratio_in_decode"], 2) == 2.31
    assert engines["leank"]["in_prefill"] < engines["vLLM"]["in_prefill"] == pytest.approx(21.17, 1)


def test_plan_says_what_steps_in_flight_take(recall):
    """Of prompts that are read pruned, and with how many tokens of a step more would fit."""
    args = ["--kv-cache-memory", "1GiB", "--max-model-len", 32768, "--prefill", "pruned"]
    step = "--max-num-batched-tokens"
    _, many, _ = recall(*args, step, 8192)
    _, few, _ = recall(*args, step, 1024)
    assert "tokens dense, as --max-num-batched-tokens 8,192 puts up to 16,384 in flight" in many
    fit, advised, more = re.search(
        r"leank: ([\d.]+) requests.*; with --max-num-batched-tokens (\d+), ([\d.]+) fit", many
    ).groups()
    _, out, _ = recall(*args, step, advised, "--json")
    in_prefill = {one["name"]: one["in_prefill"] for one in json.loads(out)["engines"]}["leank"]
    assert float(more) == round(in_prefill, 1) > 1.5 * float(fit)
    assert "in flight" in few
    assert "; with --max-num-batched-tokens" not in few
    assert "in flight" not in recall(*args[:4])[1]


def test_the_help_knows_the_longest_request_of_the_startup_report(leank):
    from vllm_leank.serving.report import LONG_REQUEST

    assert f"speaks of {LONG_REQUEST:,} tokens" in " ".join(leank("plan", "--help")[1].split())


def test_plan_as_a_table(recall):
    code, out, _ = recall("--kv-cache-memory", "1GiB", "--max-model-len", 8256)
    assert code == 0
    assert "sink 64, recent 256: cache of 1.00 GiB" in " ".join(out.split())
    assert "requests of 8,256 tokens that fit" in out
    for text in ("46.3", "2.19x", "2,432"):
        assert text in out
    assert "would not start" not in out


@pytest.mark.parametrize(
    ("overrides", "longest"),
    [
        ({}, 32768),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}}, 65536),
        ({"max_position_embeddings": 131072}, 131072),
    ],
    ids=["as it is", "scaled", "of a longer config"],
)
def test_plan_knows_what_requests_vllm_refuses(recall, overrides, longest):
    """Instead of a line that would not start."""
    given = "--kv-cache-memory", "8GiB", "--bits", 2, "--hf-overrides", json.dumps(overrides)
    out = recall(*given, "--max-model-len", longest)[1]
    assert "to serve it:" in out
    assert "would refuse" not in out
    out = " ".join(recall(*given, "--max-model-len", longest + 1)[1].split())
    assert "to serve it:" not in out
    assert f"vLLM would refuse this: the model's config has requests of up to {longest:,}" in out


def test_longest_requests_of_other_configs():
    linear = {"rope_type": "linear", "factor": 8.0}
    known = {"max_position_embeddings": 1 << 17}
    assert longest_request(known.get, linear) == 1 << 20
    assert longest_request(known.get, linear | {"factor": None}) == 1 << 17
    assert longest_request(known.get, linear | {"rope_type": "yarn"}) == 1 << 17
    # Scaled already, as its config says.
    assert longest_request((known | {"model_type": "gemma3_text"}).get, linear) == 1 << 17
    assert longest_request({}.get, linear) is None


def test_plan_says_what_a_step_reads(recall):
    """Of 8,256 tokens with 6,144 bytes dense, and of weights where they are known."""
    args = "--max-model-len", 8256
    code, out, _ = recall(*args, "--kv-cache-memory", "1GiB", "--json")
    dense, eight, leank = (one["step_bytes"] for one in json.loads(out)["engines"])
    assert (code, dense, eight) == (0, 8256 * 6144, 8256 * 3072)
    # Sink and recent are 320; the rest is whole granules.
    assert leank == 320 * 6144 + 7936 * 2432
    weights = "--gpu-memory", "8GiB", "--weights", "2GiB", "--tp", 2
    told = " ".join(recall(*args, *weights)[1].split())
    sizes = [readable(one // 2) for one in (dense, eight)]
    assert f"{sizes[0]} with vLLM; {sizes[1]} with vLLM, fp8 cache; " in told
    assert "with leank, and 1.00 GiB of weights once for all" in told
    _, out, _ = recall(*args, "--kv-cache-memory", "1GiB", "--bits", 2, "--pages", 512, "--json")
    some = json.loads(out)["engines"][2]["step_bytes"]
    _, out, _ = recall(*args, "--kv-cache-memory", "1GiB", "--bits", 2, "--json")
    assert some < json.loads(out)["engines"][2]["step_bytes"]


@pytest.mark.parametrize("width", [80, 70])
def test_the_table_loses_nothing_where_columns_are_few(width):
    """Names may wrap; numbers of seven digits are whole."""
    most = Capacity(9_999_999, 9_999, 9_999_999, *[9_999_999] * 3)
    names = ["vLLM", "vLLM, fp8 cache", "leank"]
    file = io.StringIO()
    Console(file=file, width=width).print(capacity_table(dict.fromkeys(names, most), 1))
    shown = file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    assert shown.count(" 9,999,999 ") == 4 * len(names)
    assert (names[1] in shown) == (width == 80)


def test_tenths_are_shown_of_few_requests_only(recall):
    args = ["--max-model-len", 8256, "--kv-cache-memory"]
    assert " 21.2 " in recall(*args, "1GiB")[1]
    assert " 2,985 " in recall(*args, "141GiB")[1]


def test_the_window_may_be_given(recall):
    args = ["--kv-cache-memory", "1GiB", "--max-model-len", 8256, "--json"]
    planned = json.loads(recall(*args, "--sink", 0, "--recent", 2048)[1])
    assert planned["window"] == {"sink": 0, "recent": 2048}
    wider, usual = planned["engines"][2], json.loads(recall(*args)[1])["engines"][2]
    assert wider["in_decode"] < usual["in_decode"]


def test_prompts_read_pruned_hold_what_the_steps_in_flight_write(recall):
    args = ["--kv-cache-memory", "1GiB", "--max-model-len", 16384, "--prefill", "pruned"]
    usual, small = (
        json.loads(recall(*args, "--json", *more)[1])
        for more in ([], ["--max-num-batched-tokens", 1024])
    )
    assert [one["max_num_batched_tokens"] for one in (usual, small)] == [8192, 1024]
    plan, window = plan_of(BUNDLED.kept_counts.tolist(), 128, 2), Window(64, 256, exact=False)
    for planned, in_flight in ((usual, 16384), (small, 2048)):
        fits = leank_capacity(plan, window, 2**30, 16384, in_flight).in_prefill
        assert planned["engines"][2]["in_prefill"] == fits
    _, out, _ = recall(*args, "--max-num-batched-tokens", 1024)
    told = " ".join(out.split())
    assert "prompts read pruned with --max-num-batched-tokens 1024: cache of 1.00 GiB" in told


def test_a_gpu_leaves_what_weights_and_vllm_do_not_take(recall, repo):
    args = ["--gpu-memory", "8GiB", "--max-model-len", 8256, "--tp", 2, "--json"]
    planned = json.loads(recall(*args)[1])
    weights = Checkpoint.open(str(repo / "benchmarks/recall/model")).weight_bytes(2)
    assert planned["weight_bytes"] == weights
    assert planned["pool_bytes"] == int(2**33 * 0.92) - weights // 2 - 3 * 2**30
    given = recall(*args, "--weights", "2GiB", "--other", 0, "--gpu-memory-utilization", 0.5)
    assert json.loads(given[1])["pool_bytes"] == 2**33 // 2 - 2**30


def test_weights_are_counted_without_loading_them(tiny_llama_dir, tmp_path):
    from safetensors import safe_open

    with safe_open(tiny_llama_dir / "model.safetensors", "numpy") as file:
        stored = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118
    checkpoint = Checkpoint.open(str(tiny_llama_dir))
    assert checkpoint.weight_bytes(2) == 2 * stored
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantised"):
        Checkpoint.open(str(tmp_path)).weight_bytes(2)


def test_requests_that_can_never_be_admitted_are_told(recall):
    code, out, _ = recall("--kv-cache-memory", "80MiB", "--max-model-len", 12288)
    assert code == 1
    told = " ".join(out.split())
    assert "does not fit while its prompt is computed: leank." in told


def test_advice_depends_on_leank_alone(recall):
    """Where only a dense cache holds no request, leank serves all the same, and is told how."""
    asked = "--max-model-len", 8192, "--bits", 2, "--prefill", "pruned"
    asked += "--max-num-batched-tokens", 512
    code, out, _ = recall(*asked, "--kv-cache-memory", "30MiB")
    assert code == 0
    assert "fits with leank; without it vLLM would not start, as it does not fit: vLLM." in out
    assert out.splitlines()[-2] == "to serve it:"
    assert "more memory" not in out
    code, out, _ = recall(*asked, "--kv-cache-memory", "3MiB")
    assert code == 1
    assert "does not fit while its prompt is computed: vLLM; vLLM, fp8 cache; leank." in out
    assert "fits with leank" not in out
    assert "to serve it:" not in out
    _, out, _ = recall(*asked, "--kv-cache-memory", "1GiB")
    assert "would not start" not in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--hf-overrides", '{"num_hidden_layers": 0}'], "num_hidden_layers 0; it must be a whole"),
        (["--hf-overrides", '{"num_attention_heads": 9}', "--tp", 2], "divide 9 query heads"),
        (["--tp", 10**36], "4096"),
        (["--max-model-len", 10**22], "268435456"),
        (["--max-num-batched-tokens", 10**26], "268435456"),
    ],
)
def test_numbers_that_cannot_be(recall, args, message):
    """End in what is wrong with them, and soon."""
    given = "--bits", 2, "--kv-cache-memory", "1GiB", "--max-model-len", 8192
    code, out, err = recall(*given, *args)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())


def test_what_serves_is_the_directory_of_a_named_config(leank):
    asked = "--bits", 2, "--kv-cache-memory", "1GiB", "--max-model-len", 8256
    code, out, _ = leank("plan", MODEL / "config.json", *asked)
    assert code == 0
    assert shlex.split(out.splitlines()[-1])[:3] == ["leank", "serve", str(MODEL)]


def test_overrides_need_the_model_that_they_change(leank):
    asked = "--kv-cache-memory", "1GiB", "--max-model-len", 8256, "--mask", BUNDLED.path
    code, out, err = leank("plan", *asked, "--hf-overrides", '{"max_position_embeddings": 65536}')
    assert (code, out) == (2, "")
    assert "--hf-overrides changes a model's config, and none is read: name MODEL" in err
    assert leank("plan", MODEL, *asked)[0] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give either --gpu-memory or --kv-cache-memory"),
        (["--gpu-memory", "80GiB", "--kv-cache-memory", "8GiB"], "give either --gpu-memory"),
        (["--gpu-memory", "2GiB"], "no memory is left for the cache: 92% of 2.00 GiB"),
        (["--gpu-memory", "2GiB"], "check --gpu-memory, --gpu-memory-utilization, --weights and"),
        (["--gpu-memory", "lots"], "'lots' is no size; write sizes like 141GiB"),
        (["--gpu-memory", "80"], "'80' has no unit; write sizes like 141GiB"),
        (["--kv-cache-memory", "1GiB", "--tp", 3], "--tp is 3, which neither divides 2 KV heads"),
        (["--kv-cache-memory", "1GiB", "--sink", 30], "sink is 30, but must be 0 or a multiple"),
        (["--kv-cache-memory", "1GiB", "--mask", "/none.yaml"], "/none.yaml"),
    ],
)
def test_what_cannot_be_planned(recall, args, message):
    code, _, err = recall("--max-model-len", 8192, *args)
    assert code == 2
    assert message in " ".join(err.split())


def test_a_mask_of_another_model(recall, tiny_llama_dir, tmp_path):
    save_mask(random_mask(tiny_llama_dir, [32, 0]), tmp_path / "m.yaml")
    args = ["--kv-cache-memory", "1GiB", "--max-model-len", 64, "--mask", tmp_path / "m.yaml"]
    code, _, err = recall(*args)
    assert code == 2
    assert "geometry is not that of" in err


@pytest.mark.parametrize(("bits", "least"), [(8, 7.9), (4, 3.9), (2, 1.9), (1, 0.9), (0.75, 0.7)])
def test_plan_before_there_is_a_mask(recall, bits, least):
    code, out, _ = recall(
        "--bits", bits, "--kv-cache-memory", "1GiB", "--max-model-len", 8256, "--json"
    )
    assert code == 0
    planned = json.loads(out)
    assert planned["mask"] is None
    assert least < planned["bits"] <= bits
    dense, leank = planned["engines"][0], planned["engines"][-1]
    ratio = dense["far_token_bytes"] / leank["far_token_bytes"]
    assert 10 / bits < ratio <= 16 / least  # scales of V and padding take the rest


def test_plans_know_what_is_selected(recall):
    asked = ["--bits", 2, "--kv-cache-memory", "1GiB", "--max-model-len", 8256, "--json"]
    _, out, _ = recall(*asked)
    code, selecting, _ = recall(*asked, "--pages", "0.1")
    assert code == 0
    without, planned = json.loads(out), json.loads(selecting)
    sizes = [one["engines"][-1]["far_token_bytes"] for one in (without, planned)]
    # Two bytes of each head, which what layers are rounded up to may hold already.
    assert sizes[0] <= sizes[1] <= 1.07 * sizes[0]
    assert '"pages": 0.1' in planned["serve"]
    _, _, err = recall(*asked, "--pages", "7")
    assert "pages is 7" in err


def test_plan_says_that_there_is_no_mask(recall):
    asked = ["--bits", 2, "--kv-cache-memory", "1GiB", "--max-model-len", 8256]
    code, out, _ = recall(*asked)
    assert code == 0
    assert "no mask, 2.00 bits per number" in " ".join(out.split())
    code, _, err = recall(*asked, "--mask", "m.yaml")
    assert code == 2
    assert "exclude each other" in err
    code, _, err = recall("--bits", 10, *asked[2:])
    assert code == 2
    assert "between 0.75 and 8" in err


def test_plan_ends_in_the_line_to_serve_with(recall, tmp_path):
    """Another command reads it as it stands, and it asks for what was planned."""
    model = str(MODEL)
    asked = ["--bits", 2, "--kv-cache-memory", "1GiB", "--max-model-len", 8256, "--recent", 512]
    _, out, _ = recall(*asked, "--prefill", "pruned", "--tp", 2)
    words = shlex.split(out.splitlines()[-1])
    assert words == [
        *("leank", "serve", model, "--bits", "2", "--max-model-len", "8256"),
        *("--tensor-parallel-size", "2", "--kv-cache-memory-bytes", str(2**30)),
        *("--additional-config", '{"leank": {"recent": 512, "prefill": "pruned"}}'),
    ]
    from vllm_leank.serving.line import parse_words

    del words[words.index("--bits") : words.index("--bits") + 2]  # leank's own
    parsed = parse_words(words[2:])
    assert parsed.kv_cache_memory_bytes == 2**30


def test_plan_needs_no_model_where_there_is_its_mask(leank):
    asked = ["--kv-cache-memory", "1GiB", "--max-model-len", 8256, "--json"]
    code, out, _ = leank("plan", "--mask", BUNDLED.path, *asked)
    assert code == 0
    planned = json.loads(out)
    assert planned["model"] == "leank/recall"
    assert not planned["model_read"]
    assert [one["far_token_bytes"] for one in planned["engines"]] == [6144, 3072, 2432]
    _, out, _ = leank("plan", "--mask", BUNDLED.path, *asked[:-1])
    assert "states that layers keep beside attention" in out
    code, _, err = leank("plan", *asked)
    assert code == 2
    assert "name one model: leank plan MODEL, or its mask by --mask" in err


def test_weights_are_counted_as_transformers_builds_them(tmp_path):
    """And the shape read from a config is that of transformers."""
    import transformers

    shapes = Path(__file__).parents[1] / "benchmarks/shapes"
    llama, qwen = (
        json.loads((shapes / name / "config.json").read_text()) | {"num_hidden_layers": 2}
        for name in ("llama-3.1-8b", "qwen2.5-7b")
    )
    more = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    qwen3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
    mistral = {"rope_scaling": None, "model_type": "mistral"}
    plain = mistral | {"sliding_window": None}
    for config in (llama, qwen, llama | more, llama | plain, qwen | qwen3):
        (tmp_path / "config.json").write_text(json.dumps(config))
        read = plain_config(str(tmp_path))
        assert read is not None
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert Geometry.from_hf_config(read) == Geometry.from_hf_config(theirs)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(theirs)
        assert count_weights(read) == sum(weight.numel() for weight in model.parameters())
    unknown = (
        mistral,
        {"rope_scaling": {"type": "yarn"}},
        {"auto_map": {}},
        {"num_key_value_heads": None},
    )
    for change in unknown:
        (tmp_path / "config.json").write_text(json.dumps(llama | change))
        assert plain_config(str(tmp_path)) is None


def test_plan_without_a_mask_suggests_bits(leank, tiny_llama_dir):
    code, _, err = leank(
        "plan", "--model", tiny_llama_dir, "--kv-cache-memory", "1GiB", "--max-model-len", 8256
    )
    assert code == 2
    assert f"leank mask calibrate {tiny_llama_dir} --bits 2" in err
    assert "or plan without a mask: --bits 2" in err


def test_memory_of_nothing_is_refused(recall):
    code, _, err = recall("--kv-cache-memory", "0", "--bits", 2, "--max-model-len", 4096)
    assert code == 2
    assert "no memory is left for the cache" in err


@pytest.mark.parametrize("head_dim", [96, 160, 192, 224])
def test_heads_have_as_many_bits_as_they_can(head_dim):
    """Channels are in classes of powers of two, so not all of these can have 8 bits."""
    found = even_bits(2, 2, head_dim, 8)
    most = (class_widths(head_dim) @ np.array(CODE_CLASSES)).max() / head_dim
    assert found.k_bits.mean() == found.v_bits.mean() == most
    assert 5 < most < 8
