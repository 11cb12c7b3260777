"""Options, and what the startup report says."""

from dataclasses import replace

import numpy as np
import pytest
from mask_samples import statistics_of

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.options import OptionError, Options, given_options, parse_options, read_options
from vllm_leank.core.page_sizes import plan_cache
from vllm_leank.core.window import Window
from vllm_leank.mask.file import Mask
from vllm_leank.mask.settings import Settings, _window, plan_settings
from vllm_leank.serving.report import describe, report


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (None, Options()),
        ({}, Options()),
        ({"other": {"sink": "x"}}, Options()),
        ({"leank": {}}, Options()),
        ({"leank": {"mask": "m.yaml"}}, Options(mask="m.yaml")),
        ({"leank": {"sink": 0, "recent": 32}}, Options(sink=0, recent=32)),
        ({"leank": {"sink": None}}, Options()),
    ],
)
def test_options_are_read(given, options):
    assert parse_options(given) == options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"sinc": 64},
            'leank has no option "sinc"; allowed: mask, sink, recent, prefill',
        ),
        ({"sink": "64"}, "leank option sink = '64': input should be a valid integer"),
        ({"sink": 64.0}, "leank option sink = 64.0: input should be a valid integer"),
        ({"recent": True}, "leank option recent = True: input should be a valid integer"),
        ({"sink": -32}, "leank option sink is -32, but must be 0 or a multiple of 32"),
        ({"sink": 30}, "leank option sink is 30, but must be 0 or a multiple of 32"),
        ({"recent": 16}, "leank option recent is 16, but must be at least 32"),
        ({"pages": 1 << 40}, "leank option pages is 1099511627776, but must be at most 268435456"),
        ({"mask": 3}, "leank option mask = 3: input should be a valid string"),
        ({"mask": ""}, "leank option mask = '': string should have at least 1 character"),
        (
            {"archive_dtype": "fp8"},
            "leank option archive_dtype is no more: remove it; smaller than 8-bit floats, and "
            "nearer to dense attention, is a mask of bits: leank mask calibrate MODEL --bits 4",
        ),
        (
            {"prefill": "dense"},
            "leank option prefill = 'dense': input should be 'exact' or 'pruned'",
        ),
        ({"archive_dtype": 8}, "leank option archive_dtype is no more"),
        ([], 'additional_config["leank"] is [], but must be a mapping of options'),
        ("m.yaml", "additional_config[\"leank\"] is 'm.yaml', but must be a mapping of options"),
        (None, 'additional_config["leank"] is None, but must be a mapping of options'),
        ({1: 2}, 'additional_config["leank"]: option names must be strings'),
    ],
)
def test_wrong_options_are_refused_by_name(given, message):
    with pytest.raises(OptionError) as refused:
        parse_options({"leank": given})
    assert str(refused.value).startswith(message)


def test_a_retired_option_is_refused_wherever_it_is_given():
    with pytest.raises(OptionError, match="leank option archive_dtype is no more: remove it"):
        parse_options({"archive_dtype": "fp8"})
    assert given_options({"archive_dtype": "fp8"})


def test_every_wrong_option_is_named_and_the_others_are_read():
    given = {"leank": {"sinc": 64, "recent": "x", "sink": 30, "mask": "m.yaml"}}
    with pytest.raises(
        OptionError,
        match=r"option sink is 30.*; leank option recent = 'x'.*; leank has no option \"sinc\"",
    ):
        parse_options(given)
    options, faults = read_options(given)
    assert options == Options(mask="m.yaml")
    assert list(faults) == ["sink", "recent", "sinc"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, False), ({}, False), ({"leank": {}}, True), ("leank", False)],
)
def test_whether_options_were_given(given, expected):
    assert given_options(given) is expected


def hand_made_mask(sink=64, recent=256):
    """Two layers, two heads of 64 channels, which keep 0, 32, 32 and 64."""
    keep = np.zeros((2, 2, 64), bool)
    keep[0, 1, :32] = keep[1, 0, 16:48] = keep[1, 1] = True
    return Mask.from_keep(
        keep,
        Geometry(2, 2, 64, 10000.0, None),
        model="org/tiny",
        provenance={"method": "by hand"},
        sink=sink,
        recent=recent,
        path="tiny.yaml",
        sha256="0123456789abcdef",
    )


@pytest.mark.parametrize(
    ("options", "made_for", "window"),
    [
        (Options(), (64, 256), Window(64, 256)),
        (Options(sink=0), (64, 256), Window(0, 256)),
        (Options(recent=100), (64, 256), Window(64, 100)),
        (Options(), (4, 64), Window(32, 64)),
        (Options(), (33, 64), Window(64, 64)),
        (Options(prefill="pruned"), (64, 256), Window(64, 256, exact=False)),
    ],
)
def test_window_comes_from_options_then_from_the_mask(options, made_for, window):
    assert _window(options, hand_made_mask(*made_for)) == window


def settings(window, mask):
    plan = plan_cache(mask.profiles, 64, 2)
    return Settings(mask, window, replace(plan, archive_block=64))


def test_report_of_a_mask_of_bits():
    """128 layers of 8 heads; all of K and V in 2 bits, but for a head without and one of 4 bits."""
    geometry = Geometry(128, 8, 64, 1e4, None)
    bits = np.full((2, 128, 8, 64), 2, np.uint8)
    bits[:, 0, 0], bits[:, 0, 1] = 0, 4
    mask = Mask.from_bits(
        *bits, geometry, model="org/m", provenance={"method": "by hand"},
        statistics=statistics_of((128, 8, 64)),
    )  # fmt: skip
    lines = describe(plan_settings(mask, Options(), 2))
    assert lines[1] == (
        "leank mask: 2.0 bits per number (8.0x), of 1,024 heads of 64 channels in 128 layers "
        "1 store nothing; 1022 store K 64 x 2, V 64 x 2; 1 store K 64 x 4, V 64 x 4"
    )
    assert lines[3].endswith("(13.3%); packed archive pages of 256 tokens")


def test_report_of_a_hand_made_mask():
    """A far token has 192 and 448 bytes in the two layers; 134 blocks of 40 KiB hold a request."""
    lines = report(settings(Window(64, 256), hand_made_mask()), num_blocks=1000, length=8192)
    assert lines == [
        "leank mask: org/tiny, by hand, sha256 0123456789ab, tiny.yaml",
        "leank mask: 50.0% of K and 75.0% of V kept; of 4 heads of 64 channels in 2 layers "
        "1 keep 0, 2 keep 32, 1 keep 64",
        "leank window: sink 64, recent 256 tokens dense",
        "leank cache: 640 bytes per far token against 1,024 dense (62.5%); archive pages of 64 "
        "tokens",
        "leank capacity: 5.6 requests of 8,192 tokens at once, 4.9 dense (1.15x), in 0.04 GiB",
    ]


def test_report_says_when_the_window_is_not_the_masks():
    lines = report(settings(Window(32, 256), hand_made_mask(sink=4)), num_blocks=1, length=8192)
    assert lines[2] == (
        "leank window: sink 32, recent 256 tokens dense (the mask was made for 4 and 256)"
    )
