"""Sizes of memory on the command line."""

import re

import typer

_UNITS = {
    "": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate(["", "k", "m", "g", "t"])},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate(["k", "m", "g", "t"], 1)},
}


def parse_size(text: str) -> int:
    """Bytes of a size like `141GiB`, `16GB` or `1073741824`.

    Raises:
        typer.BadParameter: it is no size, or so few bytes that their unit must have been left out.
    """
    match = re.fullmatch(r"(\d{1,20}(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        fault = "is no size"
    elif match[2] == "" and 0 < float(match[1]) < 2**20:
        fault = "has no unit"
    else:
        return int(float(match[1]) * _UNITS[match[2]])
    raise typer.BadParameter(f"{text!r} {fault}; write sizes like 141GiB or 16GB")


def readable(size: int) -> str:
    """A size for people, in the largest unit of which it is 0.01 or more."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power / 100:
            return f"{size / 2**power:,.2f} {unit}"
    return f"{size} bytes"
