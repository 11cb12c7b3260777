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
        typer.BadParameter: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(f"{text!r} is no size; write sizes like 141GiB or 16GB")
    return int(float(match[1]) * _UNITS[match[2]])


def gib(size: int) -> str:
    """A size in GiB, for people."""
    return f"{size / 2**30:,.2f} GiB"
