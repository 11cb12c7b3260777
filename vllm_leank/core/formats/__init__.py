"""Archive formats by name: one file each, and nothing outside it asks which one is in use.

Every file of this folder that has a `FORMAT` is a format.
"""

import importlib
import pkgutil

from vllm_leank.core.formats.format import ArchiveFormat
from vllm_leank.core.formats.native import Native

__all__ = [
    "NATIVE",
    "ArchiveFormat",
    "check_format",
    "find_format",
    "known_formats",
    "register_format",
]

NATIVE = Native()
"""The default."""

_FORMATS: dict[str, ArchiveFormat] = {}


def register_format(archive_format: ArchiveFormat) -> None:
    """Make a format known by its name, in this process."""
    _FORMATS[archive_format.name] = archive_format


def known_formats() -> tuple[ArchiveFormat, ...]:
    """All formats, the default first."""
    return tuple(_FORMATS.values())


def find_format(name: str) -> ArchiveFormat:
    """The format of this name.

    Raises:
        ValueError: there is none; the message says which there are.
    """
    if name not in _FORMATS:
        raise ValueError(f"archive_dtype is {name!r}, but must be one of: {', '.join(_FORMATS)}")
    return _FORMATS[name]


def check_format(name: str) -> str:
    """The name itself, if a format has it; see `find_format`."""
    return find_format(name).name


register_format(NATIVE)
for _file in pkgutil.iter_modules(__path__, f"{__name__}."):
    _found = getattr(importlib.import_module(_file.name), "FORMAT", NATIVE)
    register_format(_found)
