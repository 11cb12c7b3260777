"""Malformed masks and options: each is read or refused with a message, nothing else happens.

`LEANK_MALFORMED=20` plays twenty times as many. Malformed requests are in test_serve.py.
"""

import os

from malformed import masks, options
from mask_samples import packed_mask

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.options import OptionError, parse_options
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.text import dump_mask, parse_mask

TIMES = int(os.environ.get("LEANK_MALFORMED", "1"))


def refusal(read, given, error):
    """The message with which something is refused, or nothing; other errors are not caught."""
    try:
        read(given)
    except error as refused:
        return str(refused)
    return ""


def test_masks(repo):
    text = (repo / "masks/leank/recall.yaml").read_text(encoding="utf-8")
    messages = [refusal(parse_mask, changed, MaskError) for changed in masks(text, 600 * TIMES)]
    assert sum(map(bool, messages)) > 450 * TIMES
    assert not [message for message in messages if "Error" in message]


def test_masks_of_bits():
    text = dump_mask(packed_mask(Geometry(2, 2, 128, 1e4, None)))
    messages = [refusal(parse_mask, changed, MaskError) for changed in masks(text, 400 * TIMES)]
    assert sum(map(bool, messages)) > 300 * TIMES
    assert not [message for message in messages if "Error" in message]


def test_options():
    given = [{"leank": one} for one in options(400 * TIMES)]
    messages = [refusal(parse_options, one, OptionError) for one in given]
    assert sum(map(bool, messages)) > 300 * TIMES
    assert all("leank" in message for message in messages if message)
