"""`leank mask compose`: which channels and heads are left, and what is refused."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from mask_samples import statistics_of

from vllm_leank import cli
from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import UserError
from vllm_leank.mask.compose import _filled, compose, read_streaming_heads
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.file import load_mask, save_mask
from vllm_leank.mask.mask import Mask

GEOMETRY = Geometry(2, 2, 64, 1e4, None)


def mask_of(ranges, align=32, model="org/name", geometry=GEOMETRY, **window):
    """A mask whose heads keep these ranges of channels."""
    keep = np.zeros((2, 2, 64), bool)
    for head, (start, end) in zip(keep.reshape(4, 64), ranges, strict=True):
        head[start:end] = True
    provenance = {"method": "by hand"}
    return Mask.from_keep(keep, geometry, model=model, align=align, provenance=provenance, **window)


FIRST = mask_of([(0, 64), (0, 32), (16, 48), (0, 0)])
SECOND = mask_of([(32, 64), (32, 64), (0, 32), (0, 64)], align=16, sink=128, recent=64)


def kept(mask):
    return [np.flatnonzero(head).tolist() for head in mask.keep.reshape(4, 64)]


def test_intersection_is_filled_up_with_the_first_masks_slowest_pairs():
    mask = compose([FIRST, SECOND])
    # The third head shares 16..31; of the first mask's 32..47, the slowest are 47, 46, ...
    assert kept(mask) == [[*range(32, 64)], [], [*range(16, 48)], []]
    assert (mask.align, mask.sink, mask.recent) == (32, 128, 256)
    assert mask.model == "org/name"
    assert [part["sha256"] for part in mask.provenance["masks"]] == [FIRST.sha256, SECOND.sha256]
    wide = mask_of([(0, 64), (0, 32), (0, 64), (0, 0)])
    # 16..31 and 16 of the other 48: pairs (31, 63), (30, 62), ... turn slowest.
    other = mask_of([(0, 0), (0, 0), (16, 32), (0, 0)], align=16)
    assert kept(compose([wide, other]))[2] == [*range(16, 32), *range(48, 64)]


def test_pairs_of_a_part_of_the_channels():
    """Of the first 32 channels pairs are 16 apart; the others are not turned at all."""
    part = Geometry(2, 2, 64, 1e4, {"rope_type": "default", "partial_rotary_factor": 0.5})
    wide = mask_of([(0, 32), (0, 64), (0, 0), (0, 0)], align=16, geometry=part)
    keep = np.zeros((2, 2, 64), bool)
    keep[0, 0, :8] = keep[0, 1, :8] = True
    filled = _filled(keep, wide.keep, 16, part)
    assert np.flatnonzero(filled[0, 0]).tolist() == [*range(8), *range(12, 16), *range(28, 32)]
    assert np.flatnonzero(filled[0, 1]).tolist() == [*range(8), *range(32, 40)]


def test_union_is_filled_up_with_the_slowest_pairs():
    mask = compose([FIRST, SECOND], "union")
    assert kept(mask) == [[*range(64)], [*range(64)], [*range(64)], [*range(64)]]
    small = mask_of([(0, 16), (0, 0), (0, 0), (0, 0)], align=16)
    mask = compose([small, mask_of([(0, 0), (0, 0), (0, 32), (0, 0)])], "union")
    assert kept(mask)[0] == [*range(16), *range(24, 32), *range(56, 64)]


def test_masks_that_prune_with_means_are_filled_up_too():
    """To multiples of 16, as a file with statistics has them."""
    fine = mask_of([(0, 64), (0, 32), (24, 56), (0, 0)], align=16)
    first = fine.with_means(statistics_of((2, 2, 64)))
    assert first.sha256 != fine.sha256
    for other in (SECOND.with_means(statistics_of((2, 2, 64), seed=1)), SECOND):
        for by in ("intersection", "union"):
            mask, expected = compose([first, other], by), compose([fine, SECOND], by)
            assert (mask.k_bits == expected.k_bits).all()
            assert (mask.v_bits == expected.v_bits).all()
            assert mask.statistics.same_as(first.statistics)


def test_streaming_heads_and_dense_layers(tmp_path):
    (tmp_path / "heads.tsv").write_text("0.1\t0.9\n0.6\t0.5\n")
    full = Mask.full(GEOMETRY, model="org/name")
    mask = compose([full], streaming=tmp_path / "heads.tsv")
    assert mask.kept_counts.tolist() == [[0, 64], [64, 64]]
    assert mask.provenance["streaming"]["heads"] == 1
    mask = compose([full], streaming=tmp_path / "heads.tsv", streaming_share=0.75, dense_layers=[1])
    assert mask.kept_counts.tolist() == [[0, 64], [64, 64]]
    assert mask.provenance["streaming"]["heads"] == 3
    assert mask.provenance["dense_layers"] == [1]


WIDE = Geometry(2, 2, 128, 1e4, None)


def bits_of(k: int, v: int, seed: int = 0) -> Mask:
    """A mask with the same bits for all channels of K and of V, but no bits in its last head."""
    bits = np.zeros((2, 2, 2, 128), np.uint8)
    bits[0], bits[1] = k, v
    bits[:, 1, 1] = 0
    return Mask.from_bits(
        *bits,
        WIDE,
        model="org/name",
        provenance={"method": "x"},
        statistics=statistics_of((2, 2, 128), seed),
    )


def test_bits_are_joined_by_channel(tmp_path):
    first, second = bits_of(8, 2), bits_of(4, 4, seed=1)
    mask = compose([first, second])
    assert np.unique(mask.k_bits).tolist() == [0, 4]
    assert np.unique(mask.v_bits).tolist() == [0, 2]
    assert mask.statistics.same_as(first.statistics)
    assert mask.provenance["statistics"] == "of the first mask that has them"
    mask = compose([first, second], "union")
    assert np.unique(mask.k_bits).tolist() == [0, 8]
    assert np.unique(mask.v_bits).tolist() == [0, 4]
    (tmp_path / "heads.tsv").write_text("0.1\t0.9\n0.6\t0.5\n")
    mask = compose([first], streaming=tmp_path / "heads.tsv", dense_layers=[1])
    assert mask.k_bits.max(-1).tolist() == [[0, 8], [16, 16]]
    assert mask.v_bits.max(-1).tolist() == [[0, 2], [16, 16]]
    assert "statistics" not in mask.provenance
    whole = Mask.full(WIDE, model="org/name")
    assert (compose([whole, first]).k_bits == first.k_bits).all()
    assert (compose([whole, first], "union").v_bits == 16).all()


def test_prompts_stay_as_long_as_they_were(tmp_path):
    """So that longer requests are warned of: the least of all masks, as all their bits count."""

    def of(tokens, seed=0):
        told = {"method": "calibrate", "longest_prompt": tokens}
        return replace(bits_of(4, 4, seed), provenance=told, sha256="")

    assert compose([of(4000)]).provenance["longest_prompt"] == 4000
    assert compose([of(9000), of(4000, 1), bits_of(4, 4)]).provenance["longest_prompt"] == 4000
    assert compose([bits_of(4, 4), of(9000)]).provenance["longest_prompt"] == 9000
    assert "longest_prompt" not in compose([bits_of(4, 4)]).provenance
    assert "longest_prompt" not in compose([of("many"), of(True)]).provenance
    (tmp_path / "heads.tsv").write_text("0.1\t0.9\n0.6\t0.5\n")
    streaming = compose([of(4000)], streaming=tmp_path / "heads.tsv")
    assert streaming.provenance["longest_prompt"] == 4000


@pytest.mark.parametrize("made", [FIRST, bits_of(4, 4)], ids=["pruned", "bits"])
def test_what_was_measured_holds_for_a_copy_alone(made):
    measured = replace(made, evaluation={"verify": "FAIL: top-1"}, sha256="")
    assert compose([measured]).evaluation == {"verify": "FAIL: top-1"}
    assert compose([measured], dense_layers=[0]).evaluation is None
    assert compose([measured], model_id="org/other").evaluation is None
    assert compose([measured, measured]).evaluation is None


def test_bits_that_fit_no_page_are_refused():
    half = Mask.from_keep(
        np.broadcast_to(np.arange(128) % 4 == 0, (2, 2, 128)),
        WIDE,
        model="org/name",
        provenance={"method": "x"},
    )
    with pytest.raises(UserError, match=r"cannot be joined so: .* 16 bits beside fewer"):
        compose([bits_of(8, 2), half], "union")
    with pytest.raises(UserError, match=r"layers\[0\]\[0\]\.k: has 32 channels of 2 bits, which"):
        compose([bits_of(2, 2), half])
    with pytest.raises(MaskError, match="no model id"):
        compose([bits_of(2, 2)], model_id="a b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\t1\n", "layers and KV heads are"),
        ("0\t1\n0\t2\n", "outside 0..1"),
        ("0\t1\n0\tnan\n", "outside 0..1"),
        ("0\t1\n0\tx\n", "separated by tabs"),
        ("0\t1\n0\n", "separated by tabs"),
        ("\xff", "has"),
        ("", "has"),
        ("1" * (1 << 20 | 1), "larger than"),
    ],
)
def test_bad_lists_of_heads_are_refused(tmp_path, text, message):
    path = tmp_path / "heads.tsv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message if text != "\xff" else "separated by tabs"):
        read_streaming_heads(path, GEOMETRY)


@pytest.fixture
def leank(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["leank", "mask", "compose", *map(str, args)])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capsys.readouterr()
        return exit_info.value.code or 0, out, err

    return call


def test_command(leank, tiny_llama_dir):
    save_mask(FIRST, "a.yaml")
    save_mask(SECOND, "b.yaml")
    code, out, _ = leank(
        "a.yaml", "b.yaml", "--by", "union", "--out", "c.yaml", "--model-id", "x/y"
    )
    assert code == 0
    assert "0.00% of K pruned" in out
    assert load_mask("c.yaml").model == "x/y"
    code, out, _ = leank("a.yaml", "--dense-layers", "0-1", "--out", "d.yaml")
    assert code == 0
    assert load_mask("d.yaml").k_kept == 1
    code, _, _ = leank("--model", tiny_llama_dir, "--model-id", "x/y", "--out", "e.yaml")
    assert code == 0
    assert load_mask("e.yaml").k_kept == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give mask files, or --model"),
        (["a.yaml", "--model", "x"], "give mask files, or --model"),
        (["a.yaml", "other.yaml"], "do not fit each other: rope_theta is 10000.0, not 500000.0"),
        (["a.yaml", "--dense-layers", "2"], "there is no layer 2"),
        (["a.yaml", "--dense-layers", "1-"], "like 0,1,30-31"),
        (["a.yaml", "--dense-layers", "0,1-0"], "like 0,1,30-31"),
        (["a.yaml", "--streaming-share", "0.5"], "needs --streaming"),
        (["a.yaml", "--streaming", "none.tsv"], "No such file"),
        (["a.yaml", "--streaming", "heads.tsv", "--streaming-share", "2"], "between 0 and 1"),
        (["none.yaml"], "No such file"),
    ],
)
def test_faults_end_in_one_message(leank, tmp_path, arguments, message):
    save_mask(FIRST, "a.yaml")
    save_mask(mask_of([(0, 64)] * 4, geometry=Geometry(2, 2, 64, 5e5, None)), "other.yaml")
    (tmp_path / "heads.tsv").write_text("0.1\t0.9\n0.6\t0.5\n")
    code, _, err = leank(*arguments, "--out", "out.yaml")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out.yaml").exists()
