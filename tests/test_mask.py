"""The mask format: what is read, what is refused and where, and that writing keeps everything."""

import hashlib
import math
import os
import pickle
import re
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import printable
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.file import MAX_BYTES, load_mask, save_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.text import dump_mask, parse_mask

GOOD = """\
format: leank-mask/1
model: org/name
geometry: {num_layers: 2, num_kv_heads: 2, head_dim: 64, rope_theta: 500000.0, rope_scaling: null}
align: 16
window: {sink: 64, recent: 256}
provenance:
  method: import
  steps: 200
layers:
  - ["ffffffffffffffff", "0000000000000000"]
  - ["8000000000007fff", "0f0f0f0f00000000"]
"""


def test_channel_0_is_the_top_bit_of_the_first_digit():
    mask = parse_mask(GOOD)
    assert mask.kept_channels(0, 0) == tuple(range(64))
    assert mask.kept_channels(0, 1) == ()
    assert mask.kept_channels(1, 0) == (0, *range(49, 64))
    assert mask.kept_channels(1, 1) == (4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)


def test_reads_every_field():
    mask = parse_mask(GOOD)
    assert mask.model == "org/name"
    assert mask.geometry == Geometry(2, 2, 64, 500000.0, None)
    assert (mask.align, mask.sink, mask.recent) == (16, 64, 256)
    assert mask.provenance == {"method": "import", "steps": 200}
    assert mask.evaluation is None
    assert mask.keep.dtype == np.bool_
    assert mask.keep.shape == (2, 2, 64)
    assert mask.sha256 == hashlib.sha256(GOOD.encode()).hexdigest()
    assert parse_mask(GOOD + "evaluation: {needles: 0.99}\n").evaluation == {"needles": 0.99}


def test_shares():
    mask = parse_mask(GOOD)
    assert mask.kept_counts.tolist() == [[64, 0], [16, 16]]
    assert mask.k_kept == 96 / 256
    assert mask.v_kept == 3 / 4
    assert mask.far_bytes_share == (96 / 256 + 3 / 4) / 2


def test_shares_of_the_released_llama_mask():
    """Counts published for Llama-3.1-8B: K 31.25%, V 81.6%, 56.4% of the bytes."""
    counts = np.repeat([0, 32, 64, 96], [47, 120, 67, 22]).reshape(32, 8, 1)
    keep = np.arange(128) < counts
    mask = Mask.from_keep(
        keep, Geometry(32, 8, 128, 5e5, None), model="a/b", provenance={"method": "import"}
    )
    assert mask.k_kept == 0.3125
    assert round(mask.v_kept, 3) == 0.816
    assert round(mask.far_bytes_share, 3) == 0.564


def test_keep_cannot_be_changed():
    keep = np.ones((2, 2, 64), bool)
    mask = Mask.from_keep(
        keep, Geometry(2, 2, 64, 1e4, None), model="m", provenance={"method": "x"}
    )
    keep[:] = False
    assert mask.keep.all()
    with pytest.raises(ValueError, match="read-only"):
        mask.keep[0, 0, 0] = False


def test_full_mask_keeps_everything_and_pickles():
    mask = pickle.loads(pickle.dumps(Mask.full(Geometry(3, 1, 96, None, None))))
    assert mask.keep.shape == (3, 1, 96)
    assert mask.k_kept == mask.v_kept == mask.far_bytes_share == 1.0


# What replaces what in GOOD; the line, key and a part of the message that must come.
MALFORMED = {
    "empty": (GOOD, "", 1, "", "empty"),
    "only a comment": (GOOD, "# nothing\n", None, "", "empty"),
    "a list": (GOOD, "- format: leank-mask/1\n", 1, "", "not a mask file"),
    "text": (GOOD, "leank\n", 1, "", "not a mask file"),
    "other format": ("leank-mask/1", "leank-mask/3", 1, "format", "leank-mask/1"),
    "no format": ("format: leank-mask/1\n", "", 1, "format", "missing"),
    "unknown key": ("align: 16", "algin: 16", 4, "algin", "allowed here: format, model"),
    "unknown geometry key": ("num_layers: 2", "layers: 2", 3, "geometry.layers", "num_layers"),
    "unknown window key": ("sink: 64", "snik: 64", 5, "window.snik", "sink, recent"),
    "missing key": ("align: 16\n", "", 1, "align", "missing"),
    "missing nested key": (", recent: 256", "", 5, "window.recent", "missing"),
    "duplicate key": ("align: 16\n", "align: 16\nalign: 32\n", 5, "align", "first on line 4"),
    "duplicate nested key": ("sink: 64", "sink: 64, sink: 0", 5, "window.sink", "duplicate"),
    "duplicate free key": ("steps: 200", "method: 1", 8, "provenance.method", "duplicate"),
    "anchor": ("align: 16", "align: &a 16", 4, "align", "anchors"),
    "alias": ("recent: 256", "recent: *a", 5, "window.recent", "aliases"),
    "tag": ("align: 16", "align: !!int 16", 4, "align", "tags"),
    "python tag": ("align: 16", "align: !!python/object:os.system x", 4, "align", "tags"),
    "local tag": ("align: 16", "align: !x 16", 4, "align", "tags"),
    "merge key": ("  steps: 200", "  <<: {a: 1}", 8, "provenance.(key)", "not allowed"),
    "number as key": ("steps: 200", "3: 200", 8, "provenance", "plain text"),
    "list as key": ("steps: 200", "? [a]\n  : 200", 8, "provenance", "plain text"),
    "nested too deep": ("200", "[" * 40 + "]" * 40, 8, "provenance.steps", "nested"),
    # Newer versions of PyYAML refuse this by themselves, where they come across it.
    "far too deep": ("200", "[" * 9999, 8, "", "nest"),
    "second document": ("\nlayers:", "\n---\nlayers:", 9, "", "second YAML document"),
    "not YAML": ("align: 16", "align: 16: 16", 4, "", "not YAML"),
    "unclosed": ('00000000"]\n', '00000000"\n', None, "", "not YAML"),
    "tab": ("  steps", "\tsteps", 8, "", "not YAML"),
    "NUL": ("steps: 200", "steps: \0", 8, "", "not YAML"),
    "int is text": ("align: 16", "align: '16'", 4, "align", "valid integer"),
    "int is float": ("align: 16", "align: 16.0", 4, "align", "valid integer"),
    "int is bool": ("sink: 64", "sink: true", 5, "window.sink", "valid integer"),
    "int is null": ("align: 16", "align:", 4, "align", "valid integer"),
    "int is list": ("align: 16", "align: [16]", 4, "align", "valid integer"),
    "float is text": ("500000.0", "5e5", 3, "geometry.rope_theta", "valid number"),
    "float is infinite": ("500000.0", ".inf", 3, "geometry.rope_theta", "finite"),
    "float is NaN": ("steps: 200", "steps: .nan", 8, "provenance.steps", "finite"),
    "int out of range": ("500000.0", "9" * 400, 3, "geometry.rope_theta", "400 characters"),
    "int too long": ("align: 16", "align: " + "9" * 9999, 4, "align", "9,999 characters"),
    "hex too long": ("align: 16", "align: 0x" + "9" * 9999, 4, "align", "at most 100"),
    "base 60": ("200", "1:20:30", 8, "provenance.steps", "base 60"),
    "base 60 too long": ("200", "1" + ":2" * 60_000, 8, "provenance.steps", "120,001 char"),
    "base 60 float": ("200", "1:20.5", 8, "provenance.steps", "base 60"),
    "too many values": ("200", f"[{'a, ' * 100_000}]", 8, "provenance", "100,000 values"),
    "too many numbers": ("200", f"[{'1, ' * 10_001}]", 8, "provenance", "10,000 numbers"),
    "too much text": ("200", "1" * 100_001, 8, "provenance.steps", "100,001 characters"),
    "malformed number": ("align: 16", "align: 0x_", 4, "align", "not a number"),
    "theta not positive": ("500000.0", "-1.0", 3, "geometry.rope_theta", "positive"),
    "scaling is text": ("scaling: null", "scaling: yarn", 3, "geometry.rope_scaling", "mapping"),
    "type is no text": (
        "scaling: null",
        "scaling: {type: [yarn]}",
        3,
        "geometry.rope_scaling.rope_type",
        "must be text",
    ),
    "model is number": ("org/name", "3", 2, "model", "valid string"),
    "model is no id": ("org/name", "org/name/more", 2, "model", "org/name"),
    "model with blanks": ("org/name", "my model", 2, "model", "org/name"),
    "model is empty": ("org/name", "''", 2, "model", "org/name"),
    "geometry is null": (re.compile(r"geometry: .*"), "geometry:", 3, "geometry", "mapping"),
    "no layers": ("num_layers: 2", "num_layers: 0", 3, "geometry.num_layers", "at least 1"),
    "too many layers": ("num_layers: 2", f"num_layers: {10**20}", 3, "geometry.num_layers", "4096"),
    "more heads than there are": (
        "heads: 2",
        "heads: 1000000000",
        3,
        "geometry.num_kv_heads",
        "at most 4096",
    ),
    "a part of RoPE": (
        "scaling: null",
        "scaling: {rope_type: default, partial_rotary_factor: 50000000000.0}",
        3,
        "geometry.rope_scaling.partial_rotary_factor",
        "at most 1",
    ),
    "no heads": ("heads: 2", "heads: -1", 3, "geometry.num_kv_heads", "at least 1"),
    "head_dim 0": ("head_dim: 64", "head_dim: 0", 3, "geometry.head_dim", "multiple of 32"),
    "head_dim 80": ("head_dim: 64", "head_dim: 80", 3, "geometry.head_dim", "multiple of 32"),
    "head_dim 288": ("head_dim: 64", "head_dim: 288", 3, "geometry.head_dim", "up to 256"),
    "align 0": ("align: 16", "align: 0", 4, "align", "multiple of 16"),
    "align negative": ("align: 16", "align: -16", 4, "align", "multiple of 16"),
    "align 8": ("align: 16", "align: 8", 4, "align", "multiple of 16"),
    "align does not divide": ("align: 16", "align: 48", 4, "align", "divides head_dim 64"),
    "align too large": ("align: 16", "align: 128", 4, "align", "divides head_dim 64"),
    "sink negative": ("sink: 64", "sink: -1", 5, "window.sink", "at least 0"),
    "recent too small": ("recent: 256", "recent: 31", 5, "window.recent", "at least 32"),
    "window is list": ("{sink: 64, recent: 256}", "[64, 256]", 5, "window", "mapping"),
    "provenance is text": (
        "provenance:\n  method: import\n  steps: 200",
        "provenance: import",
        6,
        "provenance",
        "mapping",
    ),
    "no method": ("  method: import\n", "", 6, "provenance.method", "how the mask was made"),
    "method is empty": ("method: import", "method: ''", 7, "provenance.method", "how the mask"),
    "evaluation is list": ("\nlayers:", "\nevaluation: [1]\nlayers:", 9, "evaluation", "mapping"),
    "layers are null": (re.compile(r"layers:\n(.*\n)*"), "layers:\n", 9, "layers", "valid list"),
    "layers are empty": (re.compile(r"layers:\n(.*\n)*"), "layers: []\n", 9, "layers", "has 0"),
    "one layer less": ("num_layers: 2", "num_layers: 3", 9, "layers", "has 2 layers"),
    "one head less": (', "0f0f0f0f00000000"', "", 11, "layers[1]", "has 1 heads"),
    "one head more": ('00"]\n  -', '00", "00"]\n  -', 10, "layers[0]", "has 3 heads"),
    "layer is text": ('["8000000000007fff", "0f0f0f0f00000000"]', "ff", 11, "layers[1]", "list"),
    "head is number": ('"0000000000000000"', "0" * 16, 10, "layers[0][1]", "valid string"),
    "one digit less": ("7fff", "7ff", 11, "layers[1][0]", "has 15 hex digits"),
    "two digits more": ("7fff", "7fff00", 11, "layers[1][0]", "64 takes 16"),
    "no hex digit": ("7fff", "7ffg", 11, "layers[1][0]", "0-9, a-f"),
    "blanks in hex": ("0f0f0f0f", "0f 0f 0f", 11, "layers[1][1]", "0-9, a-f"),
    "other digits": ("0f0f0f0f", "0f0f0f0\u0663", 11, "layers[1][1]", "0-9, a-f"),
    "count off align": ("7fff", "7ffe", 11, "layers[1][0]", "keeps 15 channels"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_with_line_and_key(case, tmp_path):
    old, new, line, key, message = MALFORMED[case]
    text = old.sub(new, GOOD, count=1) if isinstance(old, re.Pattern) else GOOD.replace(old, new, 1)
    assert text != GOOD
    path = tmp_path / "m.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MaskError, match=re.escape(message)) as caught:
        load_mask(path)
    assert caught.value.path == path
    assert caught.value.key == key
    if line is not None:
        assert caught.value.line == line
    assert str(caught.value).startswith(f"{path}, line {caught.value.line}: ")


def test_aliases_are_refused_before_they_grow():
    layers = "\n".join(
        f"a{i}: &a{i} [{', '.join(f'*a{i - 1}' for _ in range(9))}]" for i in range(1, 30)
    )
    with pytest.raises(MaskError, match="anchors"):
        parse_mask("a0: &a0 lol\n" + layers)


def test_files_that_are_no_text_files(tmp_path):
    def refuse(path, match):
        with pytest.raises(MaskError, match=match) as caught:
            load_mask(path)
        assert printable(str(path)) in str(caught.value)
        return caught.value

    refuse(tmp_path / "none.yaml", "No such file")
    refuse(tmp_path, "not a regular file")
    refuse("a\0b", "not a file name")
    os.mkfifo(tmp_path / "fifo")
    refuse(tmp_path / "fifo", "not a regular file")
    (tmp_path / "latin.yaml").write_bytes(GOOD.encode() + b"# caf\xe9\n")
    assert refuse(tmp_path / "latin.yaml", "not UTF-8").line == 12
    (tmp_path / "large.yaml").write_bytes(GOOD.encode() + b"#" * MAX_BYTES)
    refuse(tmp_path / "large.yaml", "larger than")


def test_windows_line_ends_comments_and_dates_are_fine():
    text = "\ufeff# a comment\r\n" + GOOD.replace("steps: 200", "date: 2026-01-31").replace(
        "\n", "\r\n"
    )
    assert parse_mask(text).provenance == {"method": "import", "date": "2026-01-31"}


def test_dump_is_pinned():
    assert dump_mask(parse_mask("# comment\n" + GOOD.upper().lower())) == GOOD


def test_masks_of_parts_that_do_not_fit_are_refused():
    geometry = Geometry(2, 2, 64, 1e4, None)
    keep = np.ones((2, 2, 64), bool)

    def make(keep=keep, provenance=None, **options):
        provenance = {"method": "x"} if provenance is None else provenance
        return Mask.from_keep(keep, geometry, model="m", provenance=provenance, **options)

    with pytest.raises(MaskError, match="bool of shape"):
        make(keep.astype(np.float32))
    with pytest.raises(MaskError, match="bool of shape"):
        make(keep[:1])
    with pytest.raises(MaskError, match="align"):
        make(align=24)
    for value in (math.nan, np.float32(1), object(), {1: 2}, (1, 2), "\ud800", {"\udfff": 1}):
        with pytest.raises(MaskError, match=r"provenance\.x"):
            make(provenance={"method": "x", "x": value})
    endless = {"method": "x"}
    endless["x"] = endless
    with pytest.raises(MaskError, match="nested too deep"):
        make(provenance=endless)


def test_same_object_twice_is_written_twice(tmp_path):
    shared = [1, 2]
    mask = Mask.from_keep(
        np.ones((1, 1, 64), bool),
        Geometry(1, 1, 64, 1e4, None),
        model="m",
        provenance={"method": "x", "a": shared, "b": shared},
    )
    save_mask(mask, tmp_path / "m.yaml")
    assert load_mask(tmp_path / "m.yaml").provenance == mask.provenance


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
)
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
plain = st.recursive(
    scalars,
    lambda item: st.lists(item, max_size=3) | st.dictionaries(keys, item, max_size=3),
    max_leaves=8,
)


@st.composite
def masks(draw):
    align = draw(st.sampled_from([16, 32, 64]))
    head_dim = align * draw(st.integers(1, 4))
    if head_dim % 32:
        head_dim *= 2
    num_layers, num_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    counts = rng.integers(0, head_dim // align + 1, (num_layers, num_heads, 1)) * align
    keep = rng.permuted(np.arange(head_dim) < counts, axis=-1)
    scaling = draw(st.none() | st.dictionaries(st.sampled_from("abc"), plain))
    theta = draw(st.none() | st.floats(1, 1e9))
    return Mask.from_keep(
        keep,
        Geometry(num_layers, num_heads, head_dim, theta, scaling),
        model=draw(st.from_regex(r"[A-Za-z0-9._-]{1,9}(/[A-Za-z0-9._-]{1,9})?", fullmatch=True)),
        provenance={"method": "test", **draw(st.dictionaries(keys, plain, max_size=4))}
        | {"method": "m"},
        align=align,
        sink=draw(st.integers(0, 10**6)),
        recent=draw(st.integers(32, 10**6)),
        evaluation=draw(st.none() | st.dictionaries(keys, plain, max_size=3)),
    )


@settings(max_examples=150, deadline=None)
@given(masks())
def test_round_trip(mask):
    text = dump_mask(mask)
    back = parse_mask(text)
    for name in ("model", "geometry", "align", "sink", "recent", "provenance", "evaluation"):
        assert getattr(back, name) == getattr(mask, name), name
    assert (back.keep == mask.keep).all()
    assert back.sha256 == mask.sha256
    assert dump_mask(back) == text


def test_save_never_overwrites_unasked_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "m.yaml"
    mask = parse_mask(GOOD)
    save_mask(mask, path)
    assert path.read_text() == GOOD
    assert load_mask(path).path == path
    other = Mask.full(mask.geometry)
    with pytest.raises(MaskError, match="exists already"):
        save_mask(other, path)
    assert path.read_text() == GOOD
    save_mask(other, path, overwrite=True)
    assert load_mask(path).sha256 == other.sha256
    assert [p.name for p in tmp_path.iterdir()] == ["m.yaml"]
    with pytest.raises(MaskError, match="cannot be written"):
        save_mask(mask, tmp_path / "none" / "m.yaml")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MaskError, match="cannot be written"):
        save_mask(mask, tmp_path / "folder", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "m.yaml"]


def test_what_a_killed_process_left_is_not_in_the_way(tmp_path):
    """Process ids repeat in containers; and names may be as long as the file system takes them."""
    mask = parse_mask(GOOD)
    for path in (tmp_path / "m.yaml", tmp_path / f"{'m' * 250}.yaml"):
        left = path.with_name(f".{path.name}.{os.getpid()}.part")
        if len(left.name) <= 255:
            left.write_text("part")
        save_mask(mask, path)
        assert path.read_text() == GOOD
        usual = tmp_path / "usual"
        usual.touch()
        assert path.stat().st_mode == usual.stat().st_mode
    assert len(list(tmp_path.iterdir())) == 4


def test_readers_never_see_half_a_mask(tmp_path):
    path = tmp_path / "m.yaml"
    mask = Mask.full(Geometry(64, 16, 128, 1e4, None))
    save_mask(mask, path)
    done = threading.Event()

    def write():
        while not done.is_set():
            save_mask(mask, path, overwrite=True)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        digests = {hashlib.sha256(path.read_bytes()).hexdigest() for _ in range(200)}
    finally:
        done.set()
        writer.join()
    assert digests == {mask.sha256}
