"""Archive formats by name: one file each, and nothing outside it asks which one is in use.

Every file of this folder that has a `FORMAT` is a format.
"""

import importlib
import pkgutil
from collections.abc import Iterable

from vllm_leank.core.formats.format import ArchiveFormat
from vllm_leank.core.formats.native import Native
from vllm_leank.core.profile import Profile

__all__ = [
    "NATIVE",
    "ArchiveFormat",
    "formats_for",
    "known_formats",
]

NATIVE = Native()
"""LeanK as published."""

_FORMATS: dict[str, ArchiveFormat] = {NATIVE.name: NATIVE}


def known_formats() -> tuple[ArchiveFormat, ...]:
    """All formats, `NATIVE` first."""
    return tuple(_FORMATS.values())


def formats_for(profiles: Iterable[Iterable[Profile]]) -> tuple[ArchiveFormat, ...]:
    """Formats that can store all heads of a model, the one that is taken first."""
    heads = {profile for layer in profiles for profile in layer}
    return tuple(one for one in known_formats() if all(map(one.takes, heads)))


for _file in pkgutil.iter_modules(__path__, f"{__name__}."):
    _found = getattr(importlib.import_module(_file.name), "FORMAT", NATIVE)
    _FORMATS[_found.name] = _found
