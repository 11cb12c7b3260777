"""Reads and writes mask files."""

import hashlib
import os
import stat
from pathlib import Path

from vllm_leank.core.atomic import write_atomically
from vllm_leank.core.bounded import read_bounded
from vllm_leank.mask.errors import MaskError, mask_error
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.text import dump_mask, parse_mask

MAX_BYTES = 10 << 20
"""With statistics 126 layers of 8 KV heads of 256 channels take 3.5 MB, 80 of 64 of 128 9 MB."""


def load_mask(path: str | os.PathLike[str]) -> Mask:
    """Read a mask file.

    Raises:
        MaskError: no such file, not a regular file, too large, not UTF-8, or not a valid mask.
    """
    path = Path(path)
    return parse_mask_bytes(read_mask_bytes(path), path)


def read_mask_bytes(path: Path) -> bytes:
    """The bytes of a file that may be a mask.

    Raises:
        MaskError: no such file, not a regular file, or too large.
    """
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        regular = True  # reading it says what is wrong
    if not regular:
        raise MaskError("not a regular file", path=path)
    return read_bounded(path, MAX_BYTES, "mask files", mask_error)


def parse_mask_bytes(data: bytes, path: Path) -> Mask:
    """The mask that a file's bytes are; `path` is where they come from.

    Raises:
        MaskError: not UTF-8, or not a valid mask.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise MaskError("not UTF-8 text", path=path, line=line) from error
    return parse_mask(text, path, hashlib.sha256(data).hexdigest())


def save_mask(mask: Mask, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a mask file in one step: readers see the old file, the new one, never a part.

    Raises:
        MaskError: the file exists and `overwrite` is False, or it cannot be written.
    """
    path = Path(path)
    data = dump_mask(mask).encode()
    if len(data) > MAX_BYTES:
        raise MaskError(f"would be larger than {MAX_BYTES} bytes, the limit", path=path)
    if os.path.lexists(path) and not overwrite:
        raise MaskError("exists already; choose another name or allow overwriting", path=path)
    try:
        write_atomically(path, data)
    except OSError as error:
        raise MaskError(f"cannot be written: {error.strerror}", path=path) from error
