"""Heads as records of text: how `leank-mask/2` writes bits and statistics.

Bits are a digit per channel, of `0 2 4 8 f`; statistics are base64 of little-endian float16.
"""

import base64
import re
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import shortened
from vllm_leank.mask.bits import CLASSES, BitsArray
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.hex_digits import check_count, check_layers
from vllm_leank.mask.statistics import STATISTICS, HalfArray, Statistics
from vllm_leank.mask.strict_yaml import Loc

Record = Mapping[str, str]


def records_of(
    k_bits: BitsArray, v_bits: BitsArray, statistics: Statistics | None
) -> list[list[dict[str, str]]]:
    """A record per layer and head, with the keys and order of the file."""
    digits = {"k": _digits_of(k_bits), "v": _digits_of(v_bits)}
    numbers = {}
    if statistics is not None:
        numbers = {name: _base64_of(getattr(statistics, name)) for name in STATISTICS}
    num_layers, num_heads, _ = k_bits.shape
    return [
        [
            {name: texts[i][j] for name, texts in (digits | numbers).items()}
            for j in range(num_heads)
        ]
        for i in range(num_layers)
    ]


def read_records(
    layers: Sequence[Sequence[Record]], geometry: Geometry
) -> tuple[BitsArray, BitsArray, Statistics | None]:
    """Bits of K and V, and the statistics if there are any.

    Raises:
        MaskError: other numbers of layers, heads or channels, a malformed text, or statistics that
            only some heads have.
    """
    check_layers(len(layers), geometry)
    for i, heads in enumerate(layers):
        check_count(len(heads), geometry.num_kv_heads, "heads", "num_kv_heads", ("layers", i))
    wanted = [name for name in STATISTICS if name in layers[0][0]]
    for i, heads in enumerate(layers):
        for j, head in enumerate(heads):
            _check_complete(head, wanted, ("layers", i, j))

    def stacked(name: str) -> list[list[npt.NDArray[np.generic]]]:
        read = _bits if name in ("k", "v") else _numbers
        return [
            [
                read(head[name], geometry.head_dim, ("layers", i, j, name))
                for j, head in enumerate(heads)
            ]
            for i, heads in enumerate(layers)
        ]

    k_bits, v_bits = np.array(stacked("k"), np.uint8), np.array(stacked("v"), np.uint8)
    if not wanted:
        return k_bits, v_bits, None
    return k_bits, v_bits, Statistics(*(np.array(stacked(name)) for name in STATISTICS))


def _check_complete(head: Record, wanted: Sequence[str], loc: Loc) -> None:
    given = [name for name in STATISTICS if name in head]
    if given and (missing := [name for name in STATISTICS if name not in head]):
        raise MaskError("missing, beside other statistics", loc=(*loc, missing[0]))
    if bool(given) != bool(wanted):
        raise MaskError("statistics must be given for all heads, or for none", loc=loc)


_DIGIT_OF_CLASS = np.zeros(17, np.uint8)
_DIGIT_OF_CLASS[list(CLASSES)] = [ord(f"{min(kind, 15):x}") for kind in CLASSES]
_CLASS_OF_DIGIT = np.zeros(128, np.uint8)
_CLASS_OF_DIGIT[_DIGIT_OF_CLASS[list(CLASSES)]] = CLASSES


def _digits_of(bits: BitsArray) -> list[list[str]]:
    return [[head.tobytes().decode() for head in heads] for heads in _DIGIT_OF_CLASS[bits]]


def _bits(text: str, head_dim: int, loc: Loc) -> BitsArray:
    if len(text) != head_dim:
        raise MaskError(f"has {len(text)} digits; head_dim {head_dim} takes as many", loc=loc)
    if not re.fullmatch("[0248f]+", text):
        raise MaskError(f"{shortened(text)} has other characters than 0, 2, 4, 8, f", loc=loc)
    return _CLASS_OF_DIGIT[np.frombuffer(text.encode(), np.uint8)]


def _base64_of(values: HalfArray) -> list[list[str]]:
    return [
        [base64.b64encode(head.tobytes()).decode() for head in heads]
        for heads in values.astype("<f2")
    ]


def _numbers(text: str, head_dim: int, loc: Loc) -> HalfArray:
    length = -(-2 * head_dim // 3) * 4
    if len(text) != length:
        raise MaskError(
            f"has {len(text)} characters; {head_dim} numbers take {length} in base64", loc=loc
        )
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        data = b""
    # The same numbers have one text only: no stray bits, no padding too many.
    if len(data) != 2 * head_dim or base64.b64encode(data).decode() != text:
        raise MaskError(f"{shortened(text)} is not base64 of {head_dim} numbers", loc=loc)
    return np.frombuffer(data, "<f2").astype(np.float16)
