"""`leank mask import`: official masks come out channel by channel, and nothing else gets in."""

import hashlib
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_leank.mask import import_mask as importer
from vllm_leank.mask.file import load_mask
from vllm_leank.mask.select_channels import round_survivors

SHAPE = (2, 2, 64)
"""Layers, KV heads and head_dim of `tiny_llama_dir`."""


def keep(*counts: int) -> torch.Tensor:
    """A 0/1 tensor of `SHAPE` whose heads keep their first channels."""
    return (torch.arange(64) < torch.tensor(counts).reshape(2, 2, 1)).float()


@pytest.fixture
def run(leank, tiny_llama_dir, tmp_path):
    """Import a file; gives the exit code, stderr and the mask, if one was written."""

    def run(source, *options):
        out = tmp_path / "out" / "mask.yaml"
        out.parent.mkdir(exist_ok=True)
        code, _, err = leank(
            "mask", "import", source, "--model", tiny_llama_dir, "--out", out, *options
        )
        assert len(list(out.parent.iterdir())) == (code == 0), "something half-written"
        return code, err, load_mask(out) if code == 0 else None

    return run


@pytest.fixture
def pth(tmp_path):
    def save(value, **options):
        torch.save(value, tmp_path / "mask.pth", **options)
        return tmp_path / "mask.pth"

    return save


@pytest.fixture
def tsv(tmp_path):
    def save(values):
        np.savetxt(tmp_path / "factors.tsv", np.asarray(values), delimiter="\t")
        return tmp_path / "factors.tsv"

    return save


OFFICIAL = {
    "llama-3.1-8b": (
        "llama3.1-8b-instruct.pth",
        0.3125,
        209 / 256,
        {0: 47, 32: 120, 64: 67, 96: 22},
    ),
    "qwen2.5-7b": ("qwen2.5-7b-instruct.pth", 130 / 448, 0.6875, {0: 35, 32: 34, 64: 33, 96: 10}),
}


@pytest.mark.parametrize("shape", OFFICIAL)
def test_official_masks(leank, repo, tmp_path, shape):
    name, k_kept, v_kept, heads = OFFICIAL[shape]
    source = repo.parent / "shared/official-masks" / name
    if not source.is_file():
        pytest.skip(f"the official mask {name} is not here")
    model = repo / "benchmarks/shapes" / shape
    code, out, _ = leank("mask", "import", source, "--model", model, "--out", tmp_path / "m.yaml")
    assert code == 0
    mask = load_mask(tmp_path / "m.yaml")
    assert (mask.k_kept, mask.v_kept) == (k_kept, v_kept)
    assert dict(zip(*np.unique(mask.kept_counts, return_counts=True), strict=True)) == heads
    assert np.array_equal(mask.keep, torch.load(source, weights_only=True).bool().numpy())
    assert (mask.model, mask.align, mask.sink, mask.recent) == (shape, 32, 128, 768)
    assert mask.provenance["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert f"{1 - k_kept:.2%} of K pruned" in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int8])
def test_a_mask_of_any_dtype(run, pth, dtype):
    code, _, mask = run(pth(keep(0, 32, 64, 32).to(dtype)), "--model-id", "org/tiny", "--sink", 64)
    assert code == 0
    assert mask.kept_counts.tolist() == [[0, 32], [64, 32]]
    assert (mask.model, mask.sink, mask.provenance["method"]) == ("org/tiny", 64, "import")


def test_alignment_is_checked_and_can_be_chosen(run, pth):
    source = pth(keep(16, 32, 64, 0))
    code, err, _ = run(source)
    assert code == 2
    assert f"{source}: layers[0][0]: keeps 16 channels, which is no multiple of align 32" in err
    assert run(source, "--align", 16)[2].align == 16


class Payload:
    """Writes a file when a pickle of it is executed."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "executed"))


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_refused_and_not_run(run, pth, tmp_path, legacy):
    proof = tmp_path / "proof"
    values = {"mask": keep(0, 0, 0, 0), "more": Payload(proof)}
    code, err, _ = run(pth(values, _use_new_zipfile_serialization=not legacy))
    assert code == 2
    assert "never executed" in err
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Payload(proof)))
    assert run(tmp_path / "raw.pth")[0] == 2
    assert not proof.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 2, 32), "has shape (2, 2, 32); the model takes (2, 2, 64)"),
        (torch.ones(()), "has shape ()"),
        (torch.ones(1).expand(1 << 20, 1 << 20, 1 << 20), "has shape (1048576"),
        (torch.full(SHAPE, 0.5), "other values than 0 and 1"),
        (torch.full(SHAPE, float("nan")), "other values than 0 and 1"),
        (torch.ones(SHAPE, dtype=torch.complex64) * 1j, "other values than 0 and 1"),
        ({"mask": torch.ones(SHAPE)}, "holds a dict, not one dense tensor"),
        ([torch.ones(2, 64)] * 2, "holds a list"),
        (torch.ones(SHAPE).to_sparse(), "not one dense tensor"),
        (torch.ones(SHAPE, device="meta"), "not one dense tensor"),
    ],
)
def test_other_tensors_are_refused(run, pth, value, message):
    code, err, _ = run(pth(value))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_damaged_files_are_refused(run, pth, tmp_path):
    whole = pth(keep(0, 32, 64, 32)).read_bytes()
    for data in (b"", b"\x80", whole[: len(whole) // 2], whole[:-1], b"\0" * 4096, b"a text\n" * 9):
        (tmp_path / "bad.pth").write_bytes(data)
        code, err, _ = run(tmp_path / "bad.pth")
        assert code == 2, data[:20]
        assert "bad.pth: is not a plain tensor" in err


def test_flipped_bytes_never_pass_unseen(run, pth, tmp_path):
    """A flip in the data or the pickle ends in a message; elsewhere the mask is the same."""
    whole = bytearray(pth(keep(0, 32, 64, 32)).read_bytes())
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 40):
        data = bytearray(whole)
        data[at] ^= 0xFF
        (tmp_path / "bad.pth").write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            code, err, mask = run(tmp_path / "bad.pth", "--overwrite")
        if code == 0:
            assert mask.kept_counts.tolist() == [[0, 32], [64, 32]]
            mask.path.unlink()
        else:
            assert err.startswith("leank: ")


def test_files_that_are_no_files(run, tmp_path):
    (tmp_path / "folder.pth").mkdir()
    for name, message in [
        ("none.pth", "no such file"),
        ("folder.pth", "no such file"),
        ("mask.npy", "neither a .pth mask nor a .tsv"),
    ]:
        code, err, _ = run(tmp_path / name)
        assert code == 2
        assert f"{tmp_path / name}: " in err
        assert message in err


def test_large_files_are_not_read(run, tmp_path):
    with (tmp_path / "huge.pth").open("wb") as file:
        file.truncate(importer.MAX_BYTES + 1)
    assert "larger than" in run(tmp_path / "huge.pth")[1]


def test_files_that_unpack_to_more_are_not_unpacked(run, pth, tmp_path):
    """torch.save packs nothing, and what is packed may be a thousand times as large."""
    source = pth(torch.zeros(importer.MAX_BYTES // 4 + 4096))
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(source) as plain, zipfile.ZipFile(packed, "w") as archive:
        for member in plain.infolist():
            archive.writestr(member.filename, plain.read(member), zipfile.ZIP_DEFLATED)
    assert packed.stat().st_size < importer.MAX_BYTES / 100
    assert "packed.pth: unpacks to " in run(packed)[1]


def test_factors_are_rounded_as_in_training(run, tsv):
    """By hand: the quantile 0.5 of 256 factors leaves the 128 largest, here 64, 40, 24 and 0."""
    factors = np.zeros(SHAPE)
    for head, survivors in enumerate((64, 40, 24, 0)):
        row = np.linspace(0.1, 0.4, 64) + 0.5 * (np.arange(64) >= 64 - survivors)
        factors.reshape(4, 64)[head] = row
    code, _, mask = run(tsv(factors.reshape(2, -1)), "--ratio", 0.5)
    assert code == 0
    # floor((c + 16) / 32) * 32
    assert mask.kept_counts.tolist() == [[64, 32], [32, 0]]
    assert mask.kept_channels(0, 1) == tuple(range(32, 64))
    assert mask.provenance["ratio"] == 0.5
    assert mask.provenance["achieved"] == 0.5
    code, _, mask = run(tsv(factors.reshape(2, -1)), "--ratio", 0.5, "--align", 16, "--overwrite")
    assert mask.kept_counts.tolist() == [[64, 48], [32, 0]]


def test_rounding_by_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        factors = rng.random((3, 2, 64)).round(2)  # with ties
        ratio, align = rng.random(), int(rng.choice([16, 32]))
        kept = round_survivors(factors, ratio, align)
        threshold = np.quantile(factors, ratio)
        for head, chosen in zip(factors.reshape(-1, 64), kept.reshape(-1, 64), strict=True):
            count = ((head >= threshold).sum() + align // 2) // align * align
            assert chosen.sum() == count
            if 0 < count < 64:
                assert head[chosen].min() >= head[~chosen].max()


def test_channels_of_factor_zero_do_not_survive():
    """A quantile of 0 would let every channel through: most factors end at 0."""
    factors = np.zeros((1, 1, 64))
    factors[..., :32] = 0.5
    assert round_survivors(factors, 0.3, 32).sum() == 32


def test_factors_a_little_outside_are_clipped(run, tsv):
    factors = np.where(np.arange(64) < 32, 1.02, -0.01) * np.ones((4, 1))
    assert run(tsv(factors.reshape(2, -1)), "--ratio", 0.5)[2].k_kept == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 lines"),
        ("0.5\t0.5\n", "has 1 lines of 2 numbers; the model takes 2 of 128"),
        ("\t".join(["x"] * 128) + "\n", "not a table of numbers"),
        (("\t".join(["0.5"] * 128) + "\n") * 2 + "0.5\n", "not a table of numbers"),
        (("\t".join(["nan"] * 128) + "\n") * 2, "no scaling factors"),
        (("\t".join(["7"] * 128) + "\n") * 2, "no scaling factors"),
        ("\udcff", "not a table of numbers"),
    ],
)
def test_bad_factors_are_refused(run, tmp_path, text, message):
    (tmp_path / "bad.tsv").write_bytes(text.encode("utf-8", "surrogateescape"))
    code, err, _ = run(tmp_path / "bad.tsv", "--ratio", 0.7)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_options_are_checked(run, pth, tsv, leank, tmp_path):
    mask, factors = pth(keep(0, 32, 64, 32)), tsv(np.ones((2, 128)))
    for source, options, message in [
        (mask, ["--ratio", 0.7], "--ratio is for .tsv"),
        (factors, [], "need --ratio"),
        (factors, ["--ratio", 1.5], "between 0 (keep all) and 1"),
        (mask, ["--align", 24], "multiple of 16"),
        (mask, ["--recent", 5], "at least 32"),
        (mask, ["--model-id", "a b"], "no model id"),
        (mask, ["--model", "/no/such/model"], "no such directory"),
        (mask, ["--model", tmp_path], "has no config.json, so it is no model"),
    ]:
        code, err, _ = run(source, *options)
        assert code == 2
        assert message in err
    assert run(mask)[0] == 0
    code, _, err = leank(
        "mask", "import", mask, "--model", "x", "--out", tmp_path / "out" / "mask.yaml"
    )
    assert code == 2
    assert "exists already" in err
