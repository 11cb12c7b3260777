"""The mask format of bits: what is read, what is refused and where, and that nothing is lost."""

import base64
import dataclasses
import itertools
import pickle
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_samples import packed_mask, statistics_of

from vllm_leank.core.formats.packed import class_counts
from vllm_leank.core.geometry import Geometry
from vllm_leank.core.options import Options
from vllm_leank.core.profile import Profile
from vllm_leank.errors import UserError
from vllm_leank.mask.bits import MAX_PROFILES, profiles_of
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.file import MAX_BYTES, load_mask, save_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.settings import plan_settings
from vllm_leank.mask.statistics import STATISTICS
from vllm_leank.mask.text import dump_mask, parse_mask

ONES = base64.b64encode(np.ones(64, "<f2").tobytes()).decode()
NUMBERS = "".join(f'      {name}: "{ONES}"\n' for name in STATISTICS)


def head(k: str, v: str) -> str:
    return f'    - k: "{k}"\n      v: "{v}"\n{NUMBERS}'


GOOD = (
    """\
format: leank-mask/2
model: org/name
geometry: {num_layers: 2, num_kv_heads: 2, head_dim: 64, rope_theta: 500000.0, rope_scaling: null}
window: {sink: 64, recent: 256}
provenance:
  method: calibrate
  longest_prompt: 30000
profiles:
  - {k: {'16': 16, '0': 48}, v: {'16': 64}}
  - {k: {'8': 32, '4': 32}, v: {'2': 64}}
  - {k: {'4': 32, '0': 32}, v: {'4': 64}}
  - {k: {'0': 64}, v: {'0': 64}}
layers:
  - # layer 0
"""
    + head("84" * 32, "2" * 64)
    + head("f" * 16 + "0" * 48, "f" * 64)
    + "  - # layer 1\n"
    + head("0" * 64, "0" * 64)
    + head("0" * 32 + "4" * 32, "4" * 64)
)


def line_of(start: str, occurrence: int = 0) -> int:
    """The line of `GOOD`, from 1, that starts so."""
    lines = [n for n, line in enumerate(GOOD.splitlines(), 1) if line.strip().startswith(start)]
    return lines[occurrence]


def test_reads_every_field():
    mask = parse_mask(GOOD)
    assert mask.format == "leank-mask/2"
    assert (mask.model, mask.align, mask.sink, mask.recent) == ("org/name", 16, 64, 256)
    assert mask.provenance == {"method": "calibrate", "longest_prompt": 30000}
    assert mask.k_bits.dtype == mask.v_bits.dtype == np.uint8
    assert mask.k_bits[0, 0, :4].tolist() == [8, 4, 8, 4]
    assert mask.k_bits[0, 1].tolist() == [16] * 16 + [0] * 48
    assert np.unique(mask.v_bits[0, 0]).tolist() == [2]
    assert mask.statistics is not None
    assert (mask.statistics.k_scale == 1).all()
    assert mask.is_packed
    assert mask.bits == ((6 + 4 + 0 + 2) / 4 + (2 + 16 + 0 + 4) / 4) / 2
    assert mask.far_bytes_share == mask.bits / 16
    assert mask.kept_counts.tolist() == [[64, 16], [0, 32]]
    assert mask.k_kept == 112 / 256
    assert mask.v_kept == 3 / 4


def test_dump_is_pinned():
    assert dump_mask(parse_mask(GOOD)) == GOOD


def test_bits_cannot_be_changed_and_pickle():
    mask = parse_mask(GOOD)
    copy = pickle.loads(pickle.dumps(mask))
    assert copy.statistics.same_as(mask.statistics)
    assert (copy.k_bits == mask.k_bits).all()
    for array in (mask.k_bits, mask.v_bits, mask.keep, mask.statistics.k_mean):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0, 0] = 0


def test_masks_of_leank_are_bits_of_16_and_0(repo):
    mask = load_mask(repo / "masks/leank/recall.yaml")
    assert mask.format == "leank-mask/1"
    assert not mask.is_packed
    assert mask.statistics is None
    assert (mask.k_bits == 16 * mask.keep).all()
    assert (mask.v_bits == 16 * mask.keep.any(-1, keepdims=True)).all()


def test_a_mask_of_leank_with_means_is_of_format_2():
    keep = np.arange(64) < np.array([[64, 16], [0, 48]])[..., None]
    plain = Mask.from_keep(
        keep, Geometry(2, 2, 64, 1e4, None), model="m", align=16, provenance={"method": "x"}
    )
    mask = dataclasses.replace(plain, statistics=statistics_of((2, 2, 64)), sha256="")
    assert not mask.is_packed
    back = parse_mask(dump_mask(mask))
    assert (back.keep == keep).all()
    assert back.statistics.same_as(mask.statistics)
    with pytest.raises(MaskError, match="align: is 32; it must be 16"):
        dataclasses.replace(mask, align=32)


K = f'k: "{"84" * 32}"'
LAYERS = line_of("layers:")
HEAD = line_of("- k:")
# What replaces what in GOOD; the line, key and a part of the message that must come.
MALFORMED = {
    "align": ("window:", "align: 16\nwindow:", 4, "align", "allowed here: format, model"),
    "no profiles": (re.compile(r"profiles:\n(  - \{.*\n)*"), "", 1, "profiles", "missing"),
    "no k": (f"{K}\n      ", "", HEAD, "layers[0][0].k", "missing"),
    "no v": (f'      v: "{"2" * 64}"\n', "", HEAD, "layers[0][0].v", "missing"),
    "unknown key": ("k_mean:", "mean_k:", HEAD + 2, "layers[0][0].mean_k", "k, v, k_mean"),
    "digits unquoted": (K, f"k: {'84' * 32}", HEAD, "layers[0][0].k", "valid string"),
    "one digit less": (K, K.replace("84", "8", 1), HEAD, "layers[0][0].k", "has 63 digits"),
    "no class": (K, K.replace("84", "85", 1), HEAD, "layers[0][0].k", "0, 2, 4, 8, f"),
    "large f": (K, K.replace("84", "8F", 1), HEAD, "layers[0][0].k", "0, 2, 4, 8, f"),
    "other digits": (K, K.replace("84", "8\u0664", 1), HEAD, "layers[0][0].k", "0, 2, 4, 8, f"),
    "head is text": (re.compile(r"- k: (.*\n){6}"), '- "f"\n', HEAD, "layers[0][0]", "mapping"),
    "one head less": (
        re.compile(r"    - k: (.*\n){6}  - "),
        "  - ",
        HEAD,
        "layers[0]",
        "has 1 heads",
    ),
    "one layer more": ("num_layers: 2", "num_layers: 1", LAYERS, "layers", "has 2 layers"),
    "one statistic less": (
        re.compile(r"      v_scale: .*\n"),
        "",
        HEAD,
        "layers[0][0].v_scale",
        "beside other statistics",
    ),
    "one head without": (NUMBERS, "", HEAD + 2, "layers[0][1]", "for all heads, or for none"),
    "no statistics": (re.compile(r"      [kv]_(mean|scale): .*\n"), "", LAYERS, "layers", "need"),
    "statistics are empty": (ONES, "", HEAD + 2, "layers[0][0].k_mean", "has 0 characters"),
    "statistics are null": (
        f'"{ONES}"',
        "null",
        HEAD + 2,
        "layers[0][0].k_mean",
        "valid string",
    ),
    "a number more": (ONES, "ADw" + ONES, HEAD + 2, "layers[0][0].k_mean", "take 172"),
    "no base64": (ONES, "*" + ONES[1:], HEAD + 2, "layers[0][0].k_mean", "not base64"),
    "blank in base64": (ONES, " " + ONES[1:], HEAD + 2, "layers[0][0].k_mean", "not base64"),
    "no padding": (ONES, ONES[:-1] + "A", HEAD + 2, "layers[0][0].k_mean", "not base64"),
    "early padding": (ONES, "A===" + ONES[4:], HEAD + 2, "layers[0][0].k_mean", "not base64"),
    "stray bits": (
        ONES,
        ONES[:-2] + chr(ord(ONES[-2]) + 1) + "=",
        HEAD + 2,
        "layers[0][0].k_mean",
        "not base64",
    ),
    "url alphabet": (ONES, "_" + ONES[1:], HEAD + 2, "layers[0][0].k_mean", "not base64"),
    "16 beside 8": (
        K,
        'k: "' + "f" * 16 + "8" * 48 + '"',
        HEAD,
        "layers[0][0]",
        "16 bits beside fewer",
    ),
    "16 of K beside codes of V": (
        K,
        'k: "' + "f" * 64 + '"',
        HEAD,
        "layers[0][0]",
        "16 bits beside fewer",
    ),
    "part of V": (
        'v: "' + "f" * 64,
        'v: "' + "f" * 32 + "0" * 32,
        HEAD + 7,
        "layers[0][1].v",
        "all V",
    ),
    "K without V": (f'"{"f" * 64}"', f'"{"0" * 64}"', HEAD + 7, "layers[0][1].v", "all V"),
    "V without K": (
        '"' + "f" * 16 + "0" * 48,
        '"' + "0" * 64,
        HEAD + 7,
        "layers[0][1].v",
        "none without",
    ),
    "12 of 16": ("f" * 16 + "0" * 48, "f" * 12 + "0" * 52, HEAD + 6, "layers[0][1].k", "of 16"),
    "8 of 8": (
        "84" * 32,
        "8" * 8 + "4" * 56,
        HEAD,
        "layers[0][0].k",
        "has 8 channels of 8 bits, which no packed archive can hold; allowed: 0, 16, 32, 64",
    ),
    "48 of 4": (
        "84" * 32,
        "8" * 16 + "4" * 48,
        HEAD,
        "layers[0][0].k",
        "48 channels of 4 bits, which no packed archive can hold; allowed: 0, 32, 64, 128",
    ),
    "32 of 2": (
        "84" * 32,
        "8" * 32 + "2" * 32,
        HEAD,
        "layers[0][0].k",
        "32 channels of 2 bits, which no packed archive can hold; allowed: 0, 64, 128, 256",
    ),
    "profile of nobody": (
        "{'2': 64}",
        "{'2': 32}",
        line_of("- {k", 1),
        "profiles[1]",
        "no head has",
    ),
    "profile twice": (
        "{k: {'0': 64}, v: {'0': 64}}",
        "{k: {'16': 16, '0': 48}, v: {'16': 64, '8': 0}}",
        line_of("- {k", 3),
        "profiles[3]",
        "same as profile 0",
    ),
    "profile missing": (
        "  - {k: {'0': 64}, v: {'0': 64}}\n",
        "",
        line_of("profiles:"),
        "profiles",
        "lacks {'k': {'0': 64}, 'v': {'0': 64}}",
    ),
    "profile key": ("{'2': 64}", "{2: 64}", line_of("- {k", 1), "profiles[1].v", "plain text"),
    "profile of K alone": (
        ", v: {'2': 64}",
        "",
        line_of("- {k", 1),
        "profiles[1].v",
        "missing",
    ),
    "profile has more": (
        "{'2': 64}}",
        "{'2': 64}, n: 1}",
        line_of("- {k", 1),
        "profiles[1].n",
        "allowed here: k, v",
    ),
    "profile of text": ("{'2': 64}", "{'2': x}", line_of("- {k", 1), "profiles[1].v.2", "integer"),
}
for name, value, words in [
    ("k_mean", np.nan, "is nan for channel 3; it must be finite"),
    ("v_mean", np.inf, "is inf for channel 3; it must be finite"),
    ("k_scale", np.inf, "is inf for channel 3; it must be a positive number"),
    ("k_scale", 0.0, "is 0.0 for channel 3"),
    ("v_scale", -1.0, "is -1.0 for channel 3"),
]:
    numbers = np.ones(64, "<f2")
    numbers[3] = value
    changed = base64.b64encode(numbers.tobytes()).decode()
    MALFORMED[f"{name} {value}"] = (
        f'{name}: "{ONES}"',
        f'{name}: "{changed}"',
        HEAD + 2 + STATISTICS.index(name),
        f"layers[0][0].{name}",
        words,
    )


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_with_line_and_key(case, tmp_path):
    old, new, line, key, message = MALFORMED[case]
    if isinstance(old, re.Pattern):
        text = old.sub(new, GOOD, count=0 if case == "no statistics" else 1)
    else:
        text = GOOD.replace(old, new, 1)
    assert text != GOOD
    path = tmp_path / "m.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MaskError, match=re.escape(message)) as caught:
        load_mask(path)
    assert (caught.value.path, caught.value.line, caught.value.key) == (path, line, key)


def test_parts_that_do_not_fit_are_refused():
    geometry = Geometry(1, 2, 128, 1e4, None)
    mask = packed_mask(geometry)
    with pytest.raises(MaskError, match="k_bits must be uint8 of shape"):
        dataclasses.replace(mask, k_bits=mask.k_bits.astype(np.int64))
    with pytest.raises(MaskError, match="v_bits must be uint8 of shape"):
        dataclasses.replace(mask, v_bits=mask.v_bits[:, :1])
    with pytest.raises(MaskError, match=r"layers\[0\]\[0\]\.k: has other bits than"):
        dataclasses.replace(mask, k_bits=mask.k_bits + np.uint8(1))
    with pytest.raises(MaskError, match="need statistics"):
        dataclasses.replace(mask, statistics=None)
    with pytest.raises(MaskError, match="statistics must have shape"):
        dataclasses.replace(mask, statistics=statistics_of((1, 1, 128)))
    with pytest.raises(MaskError, match="k_mean must be float16"):
        dataclasses.replace(mask.statistics, k_mean=mask.statistics.k_mean.astype(np.float32))
    with pytest.raises(MaskError, match="v_scale must be float16"):
        dataclasses.replace(mask.statistics, v_scale=mask.statistics.v_scale[0])


def test_heads_have_few_profiles():
    geometry = Geometry(1, 9, 128, 1e4, None)
    k_bits = np.zeros((1, 9, 128), np.uint8)
    for index, (k8, k4) in enumerate(itertools.product((16, 32, 64), (64, 32, 0))):
        k_bits[0, index, : k8 + k4] = [8] * k8 + [4] * k4
    last = k_bits[0, 8].copy()
    k_bits[0, 8] = k_bits[0, 7]
    options = {"model": "m", "provenance": {"method": "x"}}
    options["statistics"] = statistics_of(k_bits.shape)
    mask = Mask.from_bits(k_bits, np.full_like(k_bits, 4), geometry, **options)
    assert len(profiles_of(mask.k_bits, mask.v_bits)) == MAX_PROFILES
    k_bits[0, 8] = last
    with pytest.raises(MaskError, match="profiles: heads have 9 different class widths"):
        Mask.from_bits(k_bits, np.full_like(k_bits, 4), geometry, **options)


def test_the_largest_masks_fit_and_are_read_soon(tmp_path):
    mask = packed_mask(Geometry(126, 8, 256, 5e5, None))
    save_mask(mask, tmp_path / "m.yaml")
    assert (tmp_path / "m.yaml").stat().st_size < MAX_BYTES / 2
    begin = time.process_time()
    back = load_mask(tmp_path / "m.yaml")
    assert time.process_time() - begin < 5
    assert back.sha256 == mask.sha256
    assert len(dump_mask(packed_mask(Geometry(80, 64, 128, 5e5, None)))) < MAX_BYTES


def coded(kind=2):
    """One head in codes of so many bits."""
    bits = np.full((1, 1, 64), kind, np.uint8)
    return Mask.from_bits(
        bits, bits, Geometry(1, 1, 64, 1e4, None), model="m",
        provenance={"method": "test"}, statistics=statistics_of((1, 1, 64)),
    )  # fmt: skip


def test_the_mask_decides_the_archive():
    assert plan_settings(coded(), Options(), 2).plan.archive_format.name == "packed"
    assert plan_settings(coded(16), Options(), 2).plan.archive_format.name == "auto"
    assert plan_settings(coded(), Options(), 2).plan.profiles == ((Profile(k2=64, v2=64),),)


def test_a_mask_that_no_archive_can_hold_is_refused():
    with pytest.raises(UserError, match="beside heads with fewer, which no archive can hold"):
        plan_settings(packed_mask(Geometry(2, 2, 128, 1e4, None)), Options(), 2)


@st.composite
def masks(draw):
    """Masks of random classes, in the widths that each class must have."""
    head_dim = draw(st.sampled_from([64, 96, 128, 256]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def codes():
        row, left = [], head_dim
        for kind in (2, 4, 8):
            count = rng.choice([one for one in class_counts(kind) if one <= left])
            row += [kind] * count
            left -= count
        return row + [0] * left

    def whole():
        return [16] * (16 * rng.integers(1, head_dim // 16 + 1)), [16] * head_dim

    profiles = [(codes(), codes()), (codes(), codes()), whole(), ([], []), (codes(), [])]
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 3)), head_dim)
    bits = np.zeros((2, *shape), np.uint8)
    for index in np.ndindex(shape[:2]):
        for which, row in enumerate(profiles[rng.integers(len(profiles))]):
            bits[which][index] = rng.permutation([*row, *[0] * (head_dim - len(row))])
    return Mask.from_bits(
        *bits,
        Geometry(*shape, 1e4, None),
        model="org/name",
        provenance={"method": "test"},
        statistics=statistics_of(shape, int(rng.integers(100))),
        sink=draw(st.integers(0, 10**6)),
        evaluation=draw(st.none() | st.dictionaries(st.text("ab"), st.floats(0, 1))),
    )


@settings(max_examples=100, deadline=None)
@given(masks())
def test_round_trip(mask):
    text = dump_mask(mask)
    back = parse_mask(text)
    for name in ("model", "geometry", "align", "sink", "recent", "provenance", "evaluation"):
        assert getattr(back, name) == getattr(mask, name), name
    assert (back.k_bits == mask.k_bits).all()
    assert (back.v_bits == mask.v_bits).all()
    assert back.statistics.same_as(mask.statistics)
    assert back.sha256 == mask.sha256
    assert dump_mask(back) == text
