"""`leank bench attention`: bytes, cases, pages and plumbing; the times themselves need a GPU."""

import json
import subprocess
import sys
import types
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from archive_definition import PACKED, plan_of
from cache_builder import relative_rms
from mask_samples import bits_mask, coded_mask
from vllm_leank.kernels import reference
from vllm_leank.kernels.channels import layer_channels
from vllm_leank.kernels.decode import decode
from vllm_leank.kernels.descriptors import describe_pages

from vllm_leank.bench import pools, results
from vllm_leank.bench.cases import Case, parse_case, parse_layers
from vllm_leank.core.geometry import Geometry
from vllm_leank.core.options import Options
from vllm_leank.core.selection import Selection
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.file import save_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.settings import plan_settings

KEPT = ((0, 32), (64, 16))
WINDOW = Window(32, 64)


def layout():
    return plan_of(KEPT, 64, 2).layer(1)


@pytest.fixture
def mask():
    keep = np.arange(64) < np.array(KEPT)[..., None]
    provenance = {"method": "by hand"}
    return Mask.from_keep(
        keep, Geometry(2, 2, 64, 1e4, None), model="m", provenance=provenance, align=16, sink=33
    )


def test_bytes_that_decode_must_read():
    """Llama-3.1-8B's far tokens, one layer: heads keeping 0, 32, 32, 64, 64, 96, 32, 32."""
    kept = ((0, 32, 32, 64, 64, 96, 32, 32),)
    case = Case(64, 32768, Window(128, 768))
    # boundary(32768) = 128 + 31872 // 32 * 32 = 32000: 31872 archived and 896 dense tokens.
    pruned = 352 + 7 * 128
    dense = 8 * 2 * 128 * 2
    bf16 = plan_of(kept, 128, 2).layer(0)
    assert case.read_bytes(bf16) == 64 * (896 * dense + 31872 * pruned * 2) == 5_326_241_792
    packed = plan_of(kept, 128, 2, archive_format=PACKED).layer(0)
    # 64 channels of V have 4 bits and 64 have 2; of K 32 or 64 take 16 bytes, and 96 take 32.
    coded = 6 * (16 + 48 + 2) + (32 + 48 + 2)
    assert case.read_bytes(packed) == 64 * (896 * dense + 31872 * coded)
    assert case.dense_bytes(8, 128, 2) == 64 * 32768 * 4096


def test_bytes_of_a_short_request_are_dense():
    assert Case(8, 96, WINDOW).read_bytes(layout()) == 8 * 96 * 2 * 2 * 64 * 2
    assert Case(8, 96, WINDOW).read_bytes(layout()) == Case(8, 96, WINDOW).dense_bytes(2, 64, 2)


def test_cases_of_the_command_line():
    assert parse_case("64,32768", 128, 768) == Case(64, 32768, Window(128, 768))
    assert parse_case("16,8192,64,256", 128, 768) == Case(16, 8192, Window(64, 256))
    for text, message in [
        ("64", "is not BATCH,LENGTH"),
        ("64,x", "is not BATCH,LENGTH"),
        ("64,1024,64", "is not BATCH,LENGTH"),
        ("64,1024,64,256,1", "is not BATCH,LENGTH"),
        ("64,1024,33,256", "sink is 33"),
        ("0,1024", "batch is 0"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_case(text, 128, 768)
    assert parse_layers(None, 3) == [0, 1, 2]
    assert parse_layers("2,0", 3) == [2, 0]
    for text in ("3", "-1", "a"):
        with pytest.raises(UserError):
            parse_layers(text, 3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window_block", [32, 96])
@pytest.mark.parametrize("length", [1, 96, 127, 128, 500])
def test_pages_hold_what_a_query_reads_and_no_page_is_shared(
    mask, tiny_llama_dir, packed, window_block, length
):
    case = Case(3, length, WINDOW)
    mask = coded_mask(tiny_llama_dir) if packed else mask
    plan = replace(plan_settings(mask, Options(), 2).plan, window_block=window_block)
    pages = plan.layer(1)
    tables = pools.Tables.shuffled(case, pages, 2, torch.device("cpu"))
    channels = layer_channels(*mask.layer(1, range(2)))
    cache = pools.layer_cache(pages, channels, case, tables, torch.bfloat16)
    for name, count in (
        ("window_table", tables.window_pages),
        ("archive_table", tables.archive_pages),
    ):
        used = torch.cat([getattr(batch, name).flatten() for batch in tables.batches])
        assert sorted(used[used > 0].tolist()) == list(range(1, count))
    assert cache.window_pages[0].isnan().all()
    assert (cache.archive_pages[0].view(torch.uint8) == 0xFF).all()
    query = torch.randn(3, 4, 64)
    for batch in tables.batches:
        output = torch.full_like(query, float("nan"))
        reference.attend(query, output, cache, batch, 0.125)
        assert output.isfinite().all()
        archived = range(WINDOW.sink, int(WINDOW.boundary(length)))
        dense = {token // window_block for token in range(length) if token not in archived}
        assert batch.window_table[0].nonzero().flatten().tolist() == sorted(dense)


def test_a_layer_that_stores_nothing_is_read(tiny_llama_dir, few_programs):
    """Masks of 1 bit have such layers."""
    mask = coded_mask(tiny_llama_dir)
    k_bits, v_bits = mask.k_bits.copy(), mask.v_bits.copy()
    k_bits[0] = v_bits[0] = 0
    mask = replace(mask, k_bits=k_bits, v_bits=v_bits)
    plan, case = plan_settings(mask, Options(), 2).plan, Case(3, 500, WINDOW)
    tables = pools.Tables.shuffled(case, plan.layer(0), 2, torch.device("cpu"))
    channels = layer_channels(*mask.layer(0, range(2)))
    cache = pools.layer_cache(plan.layer(0), channels, case, tables, torch.float32)
    assert plan.layer(0).archive_page_bytes == 0
    assert cache.side.shape == cache.archive_pages.shape == (tables.archive_pages, 0)
    # What kernels with tensor descriptors take; on a CPU they load through pointers.
    for one in (plan.layer(0), plan_of(((0, 0), (64, 16)), 64, 2).layer(0)):
        pages = pools.layer_cache(one, channels, case, tables, torch.bfloat16)
        describe_pages(pages.window_pages, pages.archive_pages, one, 32, 32)
    query = torch.randn(3, 4, 64)
    output, expected = (torch.full_like(query, float("nan")) for _ in range(2))
    decode(query, output, cache, tables.batches[0], 0.125)
    reference.attend(query, expected, cache, tables.batches[0], 0.125)
    assert relative_rms(output, expected) < 1e-5


def fake_flash(q, k, v, out, block_table, seqused_k, softmax_scale, k_descale=None, **_):
    """What FlashAttention computes, through the paged interface."""
    for row, length in enumerate(seqused_k.tolist()):
        key, value = (x[block_table[row].long()].flatten(0, 1)[:length].float() for x in (k, v))
        group = q.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (key, value))
        weights = (q[row].float()[:, None] @ key.transpose(1, 2) * softmax_scale).softmax(-1)
        out[row] = (weights @ value)[:, 0].to(out.dtype)


@pytest.fixture
def attention(monkeypatch):
    """The module with a stand-in for everything that only a GPU has."""
    stand_ins = {
        "flash_attn_varlen_func": fake_flash,
        "get_scheduler_metadata": lambda **_: None,
        "is_fa_version_supported": lambda version: True,
    }
    if not torch.cuda.is_available():
        module = types.ModuleType("vllm.vllm_flash_attn")
        vars(module).update(stand_ins)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    from vllm_leank.bench import attention, flash

    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(flash, name, stand_in)
    monkeypatch.setattr(attention, "read_limit", lambda device: 4e12)
    monkeypatch.setattr(attention, "copies_needed", lambda *_: 2)
    monkeypatch.setattr(attention, "release", lambda: None)
    monkeypatch.setattr(attention, "graph_ms", lambda calls: float(len([call() for call in calls])))
    monkeypatch.setattr(attention, "eager_ms", lambda call: 3.0)
    monkeypatch.setattr(
        attention, "decode_call", lambda *arguments: partial(reference.attend, *arguments)
    )
    return attention


def test_everything_but_the_clock(attention, mask):
    shape = attention.Shape(mask, [0, 1], 4, torch.bfloat16)
    lines = []
    (measured,) = attention.measure(shape, [Case(3, 500, WINDOW)], lines.append, device="cpu")
    json.dumps(measured)
    assert measured["read_limit_tb_s"] == 4
    (auto,) = measured["cases"]
    assert (auto["batch"], auto["length"], auto["archive_format"]) == (3, 500, "auto")
    assert [layer["kept"] for layer in auto["layers"]] == [[0, 32], [64, 16]]
    assert auto["flash"]["bytes"] == 3 * 500 * 2 * 2 * 64 * 2
    assert auto["flash_fp8"]["bytes"] == 3 * 500 * 2 * 2 * 64
    # boundary(500) = 416: 384 tokens archived, 116 dense; layer 0 keeps 32 + 64 items a token.
    assert auto["layers"][0]["bytes"] == 3 * (116 * 512 + 384 * 96 * 2)
    assert auto["mean"]["bytes"] == 3 * (116 * 512 + 384 * (96 + 208))
    assert auto["mean"]["ms"] == 2
    assert auto["mean"]["speedup_flash"] == 1
    assert auto["mean"]["bound_flash"] == pytest.approx(3 * 500 * 512 / auto["mean"]["bytes"])
    assert auto["layers"][0]["error"] < 0.01
    assert any("layer 1" in line for line in lines)

    from vllm_leank.bench.report_attention import print_attention

    print_attention(measured)


def test_the_first_layers_read_all_as_in_engines(attention):
    """With a selection, too: their bytes are those of all far tokens."""
    mask = bits_mask(Geometry(3, 2, 64, 1e4, None), 4, "m")
    bytes_of = []
    for asked in (None, Selection.of(128)):
        shape = attention.Shape(mask, [1, 2], 4, torch.bfloat16, asked)
        (measured,) = attention.measure(shape, [Case(2, 900, WINDOW)], print, device="cpu")
        bytes_of.append([one["bytes"] for one in measured["cases"][0]["layers"]])
    (whole, rest), (first, selected) = bytes_of
    assert first == whole == rest > selected


@pytest.mark.parametrize("wrong", [1.02, float("nan")])
def test_a_wrong_kernel_ends_the_benchmark(attention, mask, monkeypatch, wrong):
    def broken(query, output, *rest):
        reference.attend(query, output, *rest)
        output[1] *= wrong

    monkeypatch.setattr(attention, "decode_call", lambda *arguments: partial(broken, *arguments))
    shape = attention.Shape(mask, [0], 4, torch.bfloat16)
    with pytest.raises(results.CorrectnessError, match=r"leank, layer 0, .*relative RMS"):
        next(attention.measure(shape, [Case(3, 500, WINDOW)], print, device="cpu"))


def test_query_heads_must_fit(attention, mask):
    with pytest.raises(UserError, match="multiple of the mask's 2 KV heads"):
        attention.Shape(mask, [0], 3, torch.bfloat16)


def test_flash_stand_in_is_what_flash_should_be(attention):
    from vllm_leank.bench.flash import FlashDecode

    query = torch.randn(2, 4, 64)
    flash = FlashDecode.random(Case(2, 50, WINDOW), query, 2, 1, eight_bit=False)
    flash.calls(graph=True)[0]()
    assert relative_rms(flash.output[1], flash.expected(1)) < 1e-5


@pytest.fixture
def mask_file(mask, tmp_path):
    save_mask(mask, tmp_path / "m.yaml")
    return tmp_path / "m.yaml"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_there_is_one_message(leank, mask_file):
    code, _, err = leank("bench", "attention", "--mask", mask_file, "--query-heads", 4)
    assert code == 2
    assert err == "leank: leank bench attention needs an NVIDIA GPU, and torch sees none\n"


def test_options_are_checked_before_the_gpu(leank, mask_file, tmp_path):
    for options, message in [
        (["--case", "64"], "is not BATCH,LENGTH"),
        (["--layers", "7"], "layer 7 is not in the mask"),
        (["--sink", "33"], "sink is 33"),
        (["--mask", tmp_path / "none"], "cannot be read"),
        (["--out", mask_file], "exists already"),
        (["--out", tmp_path / "no" / "r.json"], "no such directory"),
        (
            ["--archive-dtype", "both"],
            "--archive-dtype is no more: remove it; ",
        ),
    ]:
        arguments = ["--mask", mask_file, "--query-heads", 4, *options]
        code, _, err = leank("bench", "attention", *arguments)
        assert code == 2
        assert message in err


def test_result_files_say_where_they_come_from(tmp_path, monkeypatch, repo):
    monkeypatch.setattr(sys, "argv", ["leank", "bench", "x", "--case", "a b"])
    head = results.header("x")
    assert head["command"] == "leank bench x --case 'a b'"
    assert {"python", "torch", "vllm"} <= set(head["machine"]["versions"])
    assert head["date"].endswith("+00:00")
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=repo, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        assert head["commit"].removesuffix("-dirty") == done.stdout.strip()
    assert results.header("x", "abc")["commit"] == "abc"
    results.save_results(head, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == head
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="cannot be written"):
        results.save_results(head, tmp_path / "no" / "r.json")
