"""What a model is called: the id that masks are made and found by."""

import hashlib
import os
import re
from pathlib import Path

# A checkpoint's folder often has a name that says nothing; then the folder above it counts.
_NAMELESS = {"model", "checkpoint", "hf"}

ID_LETTERS = "A-Za-z0-9._-"
MOST_LETTERS = 96
"""What names on the hub are made of, and how long they are at most."""


def model_name(model: str) -> str:
    """The hub id of a model, or the name of a local directory; that of the hub's cache has both.

    What an id may not have becomes a dash. A folder whose name says nothing, as `/model`, is called
    after its config.
    """
    if not os.path.isdir(model):
        return model
    path = Path(os.path.abspath(model))
    for part in path.parts:
        if cached := re.fullmatch(r"models--(.+?)--(.+)", part):
            return f"{cached[1]}/{cached[2]}"
    name = path.parent.name if path.name.lower() in _NAMELESS else path.name
    name = re.sub(f"[^{ID_LETTERS}]+", "-", name).strip("-._")[:MOST_LETTERS]
    return name or f"model-{_digest(path)}"


def _digest(folder: Path) -> str:
    """What tells a checkpoint from others that are mounted at the same place."""
    try:
        told = (folder / "config.json").read_bytes()
    except OSError:
        told = os.fsencode(folder)
    return hashlib.sha256(told).hexdigest()[:8]


def file_name(model_id: str, bits: float, streaming: float = 0) -> str:
    """Name of the file of a mask of so many bits, and this share of streaming heads, in the user's
    folder.
    """
    heads = f"-{streaming:g}streaming" if streaming else ""
    return re.sub(r"[^\w.-]+", "--", model_id) + f"-{bits:g}bit{heads}.yaml"
