"""A mask as the text of its file, and back.

The file is YAML; `masks/README.md` describes it. Reading is strict: whatever the format does not
name is refused with file, line and key, so that a slip never turns into a silently different mask.
"""

import hashlib
from pathlib import Path
from typing import Any

from vllm_leank.core.geometry import Geometry
from vllm_leank.mask.bits import check_profiles
from vllm_leank.mask.checks import check_geometry
from vllm_leank.mask.dump import dump_document
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.head_records import read_records
from vllm_leank.mask.hex_digits import keep_of_hex
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.schema import BitsFile, KeepFile, typed
from vllm_leank.mask.strict_yaml import Loc, YamlError, read_strict_yaml


def parse_mask(text: str, path: Path | None = None, sha256: str | None = None) -> Mask:
    """Read a mask from the text of a mask file; `path` is what messages call it.

    `sha256` is that of the file's bytes, by default of the text.

    Raises:
        MaskError: not a valid mask.
    """
    if sha256 is None:
        sha256 = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    lines: dict[Loc, int] = {}
    try:
        value, lines = read_strict_yaml(text)
        return _mask(typed(value), path, sha256)
    except YamlError as error:
        raise MaskError(error.reason, path=path, line=error.line, loc=error.loc) from error
    except MaskError as error:
        # The fault may be a missing key: then its parent has a line.
        loc = error.loc
        while loc and loc not in lines:
            loc = loc[:-1]
        raise MaskError(error.reason, path=path, line=lines.get(loc), loc=error.loc) from error


def _mask(file: KeepFile | BitsFile, path: Path | None, sha256: str) -> Mask:
    geometry = Geometry(**file.geometry.model_dump())
    check_geometry(geometry)
    common: dict[str, Any] = {
        "model": file.model,
        "provenance": file.provenance,
        "sink": file.window.sink,
        "recent": file.window.recent,
        "evaluation": file.evaluation,
        "path": path,
        "sha256": sha256,
    }
    if isinstance(file, KeepFile):
        keep = keep_of_hex(file.layers, geometry)
        return Mask.from_keep(keep, geometry, align=file.align, **common)
    heads = [[head.model_dump(exclude_unset=True) for head in heads] for heads in file.layers]
    k_bits, v_bits, statistics = read_records(heads, geometry)
    mask = Mask.from_bits(k_bits, v_bits, geometry, statistics=statistics, **common)
    check_profiles([profile.model_dump() for profile in file.profiles], k_bits, v_bits)
    return mask


def dump_mask(mask: Mask) -> str:
    """The text of a mask file. Equal masks give equal text."""
    return dump_document(mask.document())
