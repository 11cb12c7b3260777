"""Finds the mask for a model: the file an option names, else one of the user's folder or package's.

A mask in the user's folder wins over those of the package, and of these the most careful one.
"""

import json
import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import shortened
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.file import load_mask
from vllm_leank.mask.folders import package_folder, user_folder
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.names import model_name

_NAME_ONE = 'name a mask file, by --mask of leank or by "mask" in --additional-config of vllm serve'


def resolve_mask(
    option: str | None,
    model: str,
    geometry: Geometry,
    *,
    folder: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Mask:
    """The mask to use on `model`, a hub id or the path of a local checkpoint.

    `option` is the path of a mask file; without it, the masks in the user's folder and then those
    of the package (or only those of `folder`) are searched for one with this model id and geometry.
    `overrides` are those of the model's config, for messages.

    Raises:
        MaskError: no mask fits, more than one fits, or the file of `option` is not a valid mask.
    """
    if option is not None:
        mask = load_mask(_expanded(option))
        if mismatch := mask.geometry.mismatch(geometry):
            raise MaskError(
                f"was made for {mask.model}, whose geometry is not that of {model}: {mismatch}; "
                "name a mask of this model, or none to have one looked up",
                path=mask.path,
                loc=("geometry",),
            )
        return mask

    named = find_masks(model, folder)
    fitting = most_careful(preferred([mask for mask in named if mask.geometry == geometry]))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        files = ", ".join(str(mask.path) for mask in fitting)
        raise MaskError(f"several masks fit {model}: {files}; {_NAME_ONE}")
    reasons = "".join(f"\n  {mask.path}: {mask.geometry.mismatch(geometry)}" for mask in named)
    found = f"other geometry only:{reasons}" if named else "none has that model id"
    if broken := broken_masks(folder):
        found += "".join(
            ["\nnot looked at, as they cannot be read:", *(f"\n  {e}" for e in broken)]
        )
    where = f"comes with the package or lies in {user_folder()}" if folder is None else "is there"
    quoted = shlex.quote(model)
    if overrides:
        quoted += f" --hf-overrides {shlex.quote(json.dumps(overrides))}"
    raise MaskError(
        f"no mask for {model} ({geometry}) {where}: {found}\n"
        "make one, which takes minutes and needs no data, and start again:\n"
        f"  leank mask calibrate {quoted} --bits 2\n"
        f"or {_NAME_ONE}. These make masks that prune K as LeanK does:\n"
        f"  leank mask import MASK.pth --model {quoted} --out mask.yaml\n"
        f"  leank mask learn --ratio 0.7 --align 32 --model {quoted} --out mask.yaml"
    )


def _expanded(option: str) -> Path:
    """The path of an option, in which `~` is a home directory."""
    try:
        return Path(option).expanduser()
    except RuntimeError as error:
        raise MaskError(f"{shortened(option)} names no user's home directory") from error


def mask_of_bits(
    model: str, geometry: Geometry, bits: float, revision: str | None = None
) -> Mask | None:
    """The mask that was asked to have so many bits per element, of the user or the package.

    `revision` is that of the checkpoint it was made from, None where none was named.

    Raises:
        MaskError: more than one fits.
    """
    fitting = preferred(
        [
            mask
            for mask in find_masks(model)
            if mask.geometry == geometry
            and mask.is_packed
            and math.isclose(_bits_asked(mask), bits)
            and mask.provenance.get("revision") == revision
        ]
    )
    if len(fitting) > 1:
        files = ", ".join(str(mask.path) for mask in fitting)
        raise MaskError(f"several masks of {bits:g} bits fit {model}: {files}; remove all but one")
    return fitting[0] if fitting else None


def _bits_asked(mask: Mask) -> float:
    """What a calibration was asked for, and nearly reached; else what the mask has, as where some
    heads see no far tokens.
    """
    asked = None if "streaming" in mask.provenance else mask.provenance.get("bits")
    return float(asked) if isinstance(asked, (int, float)) else mask.bits


def preferred(masks: list[Mask]) -> list[Mask]:
    """Those of the user's folder if there are any, else all."""
    own = user_folder()
    return [mask for mask in masks if mask.path and mask.path.is_relative_to(own)] or masks


def most_careful(masks: list[Mask]) -> list[Mask]:
    """Of the package's masks the one that changes answers least, codes of most bits before pruned
    channels; others, such as the user's own, all.
    """
    bundled = package_folder()
    if not all(mask.path and mask.path.is_relative_to(bundled) for mask in masks):
        return masks
    care = [(mask.is_packed, mask.bits) for mask in masks]
    return [mask for mask, one in zip(masks, care, strict=True) if one == max(care)]


def find_masks(model: str, folder: Path | None = None) -> list[Mask]:
    """The masks of the user and the package (or in `folder`) for a hub id or a local checkpoint.

    Ids are compared without case. A local directory has no organisation in its name, so its name
    is compared with the part after the slash; a directory of the hub's cache has both.
    """
    exact, name = _model_names(model)
    return [
        mask
        for mask in list_masks(folder)
        if mask.model.lower() == exact or mask.model.lower().rpartition("/")[2] == name
    ]


def list_masks(folder: Path | None = None) -> list[Mask]:
    """All masks of the user and the package (or in `folder`), by folder and path.

    Files that are not valid masks are left out: they must not stand in the way of the others.
    """
    return _read_all(folder)[0]


def broken_masks(folder: Path | None = None) -> list[MaskError]:
    """What is wrong with the files that `list_masks` leaves out."""
    return _read_all(folder)[1]


def _read_all(folder: Path | None) -> tuple[list[Mask], list[MaskError]]:
    folders = [user_folder(), package_folder()] if folder is None else [folder]
    masks, broken = [], []
    for path in (path for one in folders for path in sorted(one.rglob("*.yaml"))):
        try:
            masks.append(load_mask(path))
        except MaskError as error:
            broken.append(error)
    return masks, broken


def _model_names(model: str) -> tuple[str, str | None]:
    """The hub id to look for and, for a local directory, the bare name; both in lower case."""
    name = model_name(model).lower()
    return name, name if os.path.isdir(model) and "/" not in name else None
