"""`leank mask`: what it prints, and that faults end in one message and exit code 2."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from mask_samples import coded_mask, packed_mask

from vllm_leank.cli.outputs import check_new
from vllm_leank.core.geometry import Geometry
from vllm_leank.core.options import Options
from vllm_leank.errors import UserError
from vllm_leank.mask import lookup as mask_resolver
from vllm_leank.mask.bits import profiles_of
from vllm_leank.mask.file import load_mask, save_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.settings import plan_settings

LONG_NAME = 300 * "m"


@pytest.fixture
def mask_file(tmp_path):
    keep = np.arange(128) < np.array([[128, 32], [0, 64]])[..., None]
    mask = Mask.from_keep(
        keep,
        Geometry(2, 2, 128, 5e5, None),
        model="org/name",
        provenance={"method": "by hand", "steps": 7},
    )
    save_mask(mask, tmp_path / "m.yaml")
    return tmp_path / "m.yaml"


def test_show_json(leank, mask_file):
    code, out, _ = leank("mask", "show", mask_file, "--json")
    shown = json.loads(out)
    assert code == 0
    # Dense: 2 layers x 2 heads x 128 channels x (K and V) x 2 bytes. Kept: 224 of K, 3 heads of V.
    assert shown["far_token_bytes_bf16"] == {"dense": 2048, "kept": 2 * (224 + 3 * 128)}
    assert shown["far_bytes_share"] == pytest.approx(1216 / 2048)
    assert shown["speed_bound"] == pytest.approx(2048 / 1216)
    assert shown["heads_by_kept"] == {"0": 1, "32": 1, "64": 1, "128": 1}
    assert shown["k_kept"] == pytest.approx(224 / 512)
    assert shown["v_kept"] == 0.75
    assert shown["kept_by_layer"] == [[128, 32], [0, 64]]
    assert shown["window"] == {"sink": 64, "recent": 256}
    assert shown["provenance"] == {"method": "by hand", "steps": 7}
    assert shown["sha256"] == load_mask(mask_file).sha256


def test_show_tables(leank, mask_file):
    code, out, _ = leank("mask", "show", mask_file)
    assert code == 0
    for text in ("org/name", "43.75%", "75.00%", "1,216 of 2,048 (59.4%)", "1.68x", "by hand"):
        assert text in out
    assert "heads keeping 32" in out
    assert "128  32" in out


def test_show_says_what_a_server_logs(leank, tiny_llama_dir, tmp_path):
    """Bytes of a far token with all that a page has of it, such as scales of V."""
    mask = coded_mask(tiny_llama_dir)
    save_mask(mask, tmp_path / "m.yaml")
    plan = plan_settings(mask, Options(), itemsize=2).plan
    shown = json.loads(leank("mask", "show", tmp_path / "m.yaml", "--json")[1])
    assert shown["far_token_bytes_bf16"]["kept"] == plan.archive_token_bytes
    assert plan.archive_token_bytes > plan.dense_token_bytes * mask.far_bytes_share
    _, out, _ = leank("mask", "show", tmp_path / "m.yaml")
    assert f"{plan.archive_token_bytes:,} of {plan.dense_token_bytes:,}" in out
    assert "no scaling" in out
    assert "None" not in out


def test_show_of_a_mask_that_keeps_nothing(leank, tmp_path):
    mask = Mask.from_keep(
        np.zeros((1, 1, 64), bool),
        Geometry(1, 1, 64, None, None),
        model="m",
        provenance={"method": "[bold]x[/nothing]"},
    )
    save_mask(mask, tmp_path / "m.yaml")
    assert (
        json.loads(leank("mask", "show", tmp_path / "m.yaml", "--json")[1])["speed_bound"] is None
    )
    code, out, _ = leank("mask", "show", tmp_path / "m.yaml")
    assert code == 0
    assert "[bold]x[/nothing]" in out


EVIL = "\x1b]0;pwned\x07\x1b[2J\x7f\x85\u202e[red]x[/no]\\"
SHOWN = r"\x1b]0;pwned\x07\x1b[2J\x7f\x85\u202e[red]x[/no]" + "\\"


def test_texts_of_a_file_steer_no_terminal(leank, mask_file):
    """Nor are they markup; what has several lines keeps them."""
    told = {"method": EVIL, EVIL: "one\ntwo", "list": [EVIL], "smile": ":smile:"}
    mask = replace(load_mask(mask_file), provenance=told, evaluation={EVIL: EVIL}, sha256="")
    save_mask(mask, mask_file, overwrite=True)
    code, out, _ = leank("mask", "show", mask_file)
    assert code == 0
    assert out.replace("\n", "").isprintable()
    assert out.count(SHOWN) == 5  # in a list the backslash is written twice
    assert ":smile:" in out
    assert re.search("one .*\n.*two ", out)
    assert json.loads(leank("mask", "show", mask_file, "--json")[1])["provenance"] == told


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{json.dumps(EVIL)}: 1", f"{SHOWN}: unknown key; allowed here: "),
        ('"a\\nleank: b": 1', r"a\nleank: b: unknown key"),
        ("note: !%1b%5b2J%0aleank x", r"note: tag !\x1b[2J\nleank: tags are not allowed"),
        (f"{json.dumps(EVIL)}: 1\n" * 2, f"{SHOWN}: duplicate key"),
    ],
    ids=["key", "line", "tag", "twice"],
)
def test_messages_about_a_file_steer_no_terminal(leank, mask_file, line, message):
    mask_file.write_text(f"format: leank-mask/1\n{line}\n")
    code, out, err = leank("mask", "show", mask_file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.rstrip("\n").isprintable()
    assert message in err


def test_show_of_bits(leank, tmp_path):
    mask = packed_mask(Geometry(2, 2, 128, 5e5, None), evaluation={"kl": 0.002})
    save_mask(mask, tmp_path / "m.yaml")
    shown = json.loads(leank("mask", "show", tmp_path / "m.yaml", "--json")[1])
    # K: heads of 4, 2, 4 and 0 bits in the mean; V: of 3, 8, 16 and 0.
    assert shown["bits"] == {"mean": 4.625, "k": 2.5, "v": 6.75}
    assert shown["bits_by_layer"] == {"k": [3, 2], "v": [5.5, 8]}
    assert shown["far_token_bytes_bf16"] == {"dense": 2048, "kept": 592}
    assert shown["profiles"] == profiles_of(mask.k_bits, mask.v_bits)
    code, out, _ = leank("mask", "show", tmp_path / "m.yaml")
    assert code == 0
    for text in (
        "4.62 (K 2.50, V 6.75)",
        "592 of 2,048 (28.9%)",
        "K 32 of 8 + 32 of 4 + 64 of 2, V 64 of 4 + 64 of 2",
        "kl",
        "0.002",
    ):
        assert text in out


def test_layers_have_the_numbers_of_the_model(leank, tmp_path):
    """As `leank mask compose --dense-layers` takes them."""
    geometry = Geometry(8, 2, 128, 5e5, None, (3, 7))
    for mask in (packed_mask(geometry), Mask.full(geometry, model="org/name")):
        save_mask(mask, tmp_path / "m.yaml", overwrite=True)
        code, out, _ = leank("mask", "show", tmp_path / "m.yaml")
        assert code == 0
        table = out[out.rindex("per KV head") if not mask.is_packed else out.rindex("V per KV") :]
        assert re.findall(r"^\W*(\d+) ", table, re.MULTILINE)[:2] == ["3", "7"]


def test_show_by_model_id(leank, mask_file, monkeypatch):
    masks = [load_mask(mask_file)]
    monkeypatch.setattr(mask_resolver, "list_masks", lambda folder: masks)
    assert json.loads(leank("mask", "show", "ORG/name", "--json")[1])["path"] == str(mask_file)
    code, _, err = leank("mask", "show", "org/other")
    assert code == 2
    assert "org/other: no mask is found for a model of this name; leank mask calibrate" in err
    code, _, err = leank("mask", "show", "none/such/mask.yaml")
    assert code == 2
    assert "none/such/mask.yaml: no such file" in err
    masks *= 2
    code, _, err = leank("mask", "show", "org/name")
    assert code == 2
    assert "several masks" in err


def test_faults_are_one_message_without_traceback(mask_file):
    mask_file.write_text(mask_file.read_text().replace("align: 32", "align: 33"))
    for arguments, message in [
        (["show", mask_file], f"leank: {mask_file}, line 4: align: is 33; it must be a multiple"),
        (
            ["calibrate", "--model", "/none", "--data", "x", "--ratio", "0.7", "--out", mask_file],
            f"leank: {mask_file}: exists already",
        ),
    ]:
        command = [sys.executable, "-c", "from vllm_leank.cli import main; main()", "mask"]
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1


def test_showing_a_mask_needs_no_torch(mask_file):
    code = (
        "import sys; from vllm_leank.cli import main\n"
        f"sys.argv = ['leank', 'mask', 'show', {str(mask_file)!r}]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'vllm', 'triton', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize(
    "command",
    [
        "mask calibrate --bits 2",
        "mask learn --ratio 0.7 --out new.yaml",
        "mask heads --data prompts.jsonl",
        "mask prompts --out new.jsonl",
        "verify",
        "plan --kv-cache-memory 1GiB --max-model-len 4096",
        "bench serve",
    ],
)
def test_commands_take_one_model_as_argument_or_option(leank, command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for models in ("", "one --model another"):
        code, _, err = leank(*command.split(), *models.split())
        assert (code, err[:23]) == (2, "leank: name one model: ")
    for models in ("no/such", "--model no/such"):
        code, _, err = leank(*command.split(), *models.split())
        assert code == 2
        assert "no/such" in err


def test_what_cannot_be_written_is_refused_before_the_work(leank, tmp_path):
    link, pipe, file = tmp_path / "link.yaml", tmp_path / "pipe", tmp_path / "file"
    link.symlink_to("nothing.yaml")
    os.mkfifo(pipe)
    file.touch()
    (tmp_path / "folder").mkdir()
    for path, overwrite, message in (
        (tmp_path / "folder", True, "folder: is a directory; name a file, as in "),
        (tmp_path / "folder", False, "folder: is a directory; name a file, as in "),
        (link, False, "link.yaml: exists already as a link to nothing.yaml; choose another name"),
        (pipe, True, "pipe: is a device, pipe or socket, not a file"),
        (tmp_path / LONG_NAME, True, "cannot be written: File name too long"),
        (file / "m.yaml", True, "file: no such directory"),
    ):
        with pytest.raises(UserError, match=message):
            check_new(path, overwrite)
    check_new(link, True)
    check_new(tmp_path / "m.yaml", False)
    asked = "--ratio", 0.5, "--data", "x", "--out", tmp_path / "folder", "--overwrite"
    code, _, err = leank("mask", "calibrate", "/none", *asked)
    assert (code, err.count("\n")) == (2, 1)
    assert "is a directory" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("mask", "show", LONG_NAME),
        ("plan", LONG_NAME, "--kv-cache-memory", "1GiB", "--max-model-len", 512),
    ],
    ids=["mask", "plan"],
)
def test_names_that_no_file_can_have_end_in_one_message(leank, arguments):
    code, out, err = leank(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.endswith("mmm...: a name too long for files\n")
