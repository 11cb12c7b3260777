"""Finds the mask for a model: the file an option names, else one that comes with the package."""

import importlib.resources
import os
import re
from pathlib import Path

from vllm_leank.core.geometry import Geometry
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.file import load_mask
from vllm_leank.mask.mask import Mask

# A checkpoint's folder often has a name that says nothing; then the folder above it counts.
_NAMELESS = {"model", "checkpoint", "hf"}

_NAME_ONE = 'name a mask file, by --mask of leank or by "mask" in --additional-config of vllm serve'


def resolve_mask(
    option: str | None, model: str, geometry: Geometry, *, folder: Path | None = None
) -> Mask:
    """The mask to use on `model`, a hub id or the path of a local checkpoint.

    `option` is the path of a mask file; without it, the masks of the package (or of `folder`) are
    searched for one with this model id and geometry.

    Raises:
        MaskError: no mask fits, more than one fits, or the file of `option` is not a valid mask.
    """
    if option is not None:
        mask = load_mask(Path(option).expanduser())
        if mismatch := mask.geometry.mismatch(geometry):
            raise MaskError(
                f"was made for {mask.model}, whose geometry is not that of {model}: {mismatch}",
                path=mask.path,
                loc=("geometry",),
            )
        return mask

    named = find_masks(model, folder)
    fitting = [mask for mask in named if mask.geometry == geometry]
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
    made = f"--model {model} --out mask.yaml"
    raise MaskError(
        f"no mask for {model} ({geometry}) comes with the package: {found}\n"
        f"{_NAME_ONE}, or make one from what LeanK's authors released, from sample prompts or by "
        "training on a GPU:\n"
        f"  leank mask import MASK.pth {made}\n"
        f"  leank mask calibrate --data prompts.jsonl --ratio 0.7 --align 32 {made}\n"
        f"  leank mask learn --ratio 0.7 --align 32 {made}"
    )


def find_masks(model: str, folder: Path | None = None) -> list[Mask]:
    """The masks of the package (or of `folder`) for a hub id or a local checkpoint.

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
    """All masks that come with the package (or lie in `folder`), ordered by path.

    Files that are not valid masks are left out: they must not stand in the way of the others.
    """
    return _read_all(folder)[0]


def broken_masks(folder: Path | None = None) -> list[MaskError]:
    """What is wrong with the files that `list_masks` leaves out."""
    return _read_all(folder)[1]


def _read_all(folder: Path | None) -> tuple[list[Mask], list[MaskError]]:
    folder = folder or Path(str(importlib.resources.files("vllm_leank.masks")))
    masks, broken = [], []
    for path in sorted(folder.rglob("*.yaml")):
        try:
            masks.append(load_mask(path))
        except MaskError as error:
            broken.append(error)
    return masks, broken


def _model_names(model: str) -> tuple[str, str | None]:
    """The hub id to look for and, for a local directory, the bare name; both in lower case."""
    if not os.path.isdir(model):
        return model.lower(), None
    path = Path(os.path.abspath(model))
    for part in path.parts:
        if cached := re.fullmatch(r"models--(.+?)--(.+)", part):
            return f"{cached[1]}/{cached[2]}".lower(), None
    name = path.parent.name if path.name.lower() in _NAMELESS else path.name
    return name.lower(), name.lower()
