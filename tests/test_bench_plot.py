"""`leank bench plot`: lines and labels, and a picture that opens."""

import json

import pytest

from vllm_leank.bench.plot import plot_speedup, read_cases, series
from vllm_leank.bench.results import ATTENTION
from vllm_leank.errors import UserError

pytest.importorskip("matplotlib")


@pytest.fixture
def file(tmp_path):
    cases = [
        {
            "batch": batch,
            "length": length,
            "sink": 128,
            "recent": 768,
            "archive_format": dtype,
            "mean": {"speedup_flash": 1.5 + factor, "bound_flash": 1.7 + factor},
        }
        for dtype, factor in (("auto", 0), ("packed", 1.5))
        for batch, length in ((64, 32768), (16, 8192), (16, 32768))
    ]
    results = {"what": ATTENTION, "mask": {"model": "llama"}, "cases": cases}
    (tmp_path / "r.json").write_text(json.dumps(results))
    return tmp_path / "r.json"


def test_lines_are_cases_that_differ_in_one_thing(file):
    lines = series(read_cases(file), "length")
    assert list(lines) == [
        "archive in the model's dtype, batch 16",
        "archive in the model's dtype, batch 64",
        "archive packed, batch 16",
        "archive packed, batch 64",
    ]
    assert [row["length"] for row in lines["archive packed, batch 16"]] == [8192, 32768]
    lines = series(read_cases(file), "batch")
    assert [row["batch"] for row in lines["archive packed, length 32,768"]] == [16, 64]


def test_a_lone_case_has_a_label(file):
    assert list(series(read_cases(file)[:1], "batch")) == ["leank"]


@pytest.mark.parametrize(("name", "magic"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml")])
def test_the_picture(leank, file, tmp_path, name, magic):
    code, _, err = leank("bench", "plot", file, "--out", tmp_path / name)
    assert (code, err) == (0, "")
    assert (tmp_path / name).read_bytes().startswith(magic)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no", "not JSON"),
        ("[]", "has no results of the kind 'decode attention'"),
        ('{"what": "engines under load"}', "has no results of the kind"),
        ('{"what": "decode attention", "mask": {"model": "m"}}', "lacks 'cases'"),
        ('{"what": "decode attention", "mask": null, "cases": null}', "is not laid out"),
        ('{"what": "decode attention", "mask": {"model": "m"}, "cases": []}', "has no cases"),
        (None, "cannot be read"),
    ],
)
def test_other_files_are_refused(leank, tmp_path, text, message):
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    code, _, err = leank("bench", "plot", tmp_path / "r.json", "--out", tmp_path / "p.png")
    assert code == 2
    assert message in err
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("length", None, "length of case 2 is None, not a positive number"),
        ("length", "long", "length of case 2 is 'long', not a positive number"),
        ("batch", 0, "batch of case 2 is 0, not a positive number"),
        ("sink", [1], r"sink of case 2 is \[1\], not a number"),
        ("recent", True, "recent of case 2 is True, not a number"),
        ("archive_format", 4, "archive_format of case 2 is 4, not a text"),
        ("mean", {"speedup_flash": None, "bound_flash": 1}, "speedup of case 2 is None"),
        ("mean", {"speedup_flash": 1, "bound_flash": float("nan")}, "bound of case 2 is nan"),
        ("mean", None, "is not laid out as a result file"),
    ],
)
def test_values_that_cannot_be_drawn_are_refused(file, name, value, message):
    results = json.loads(file.read_text())
    results["cases"][1][name] = value
    file.write_text(json.dumps(results))
    with pytest.raises(UserError, match=f"r.json: {message}"):
        plot_speedup([file], file.with_name("p.png"))
    assert not file.with_name("p.png").exists()


def test_other_pictures_are_refused(leank, file, tmp_path):
    code, _, err = leank("bench", "plot", file, "--out", tmp_path / "p.bmp")
    assert code == 2
    assert "p.bmp" in err


def test_a_picture_is_not_written_over(leank, file, tmp_path):
    out = tmp_path / "p.svg"
    out.write_text("precious")
    assert leank("bench", "plot", file, "--out", out)[0] == 2
    assert out.read_text() == "precious"
    code, said, _ = leank("bench", "plot", file, "--out", out, "--overwrite")
    assert (code, said) == (0, f"{out}: written\n")
    assert "<svg" in out.read_text()
