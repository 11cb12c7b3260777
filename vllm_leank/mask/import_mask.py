"""Imports what the official LeanK code writes: masks (`.pth`) and scaling factors (`.tsv`).

* A `.pth` file is one tensor `[num_layers, num_kv_heads, head_dim]` of 0 and 1, by `torch.save`:
  the mask that is deployed.
* A `.tsv` file has a line per layer with `num_kv_heads * head_dim` numbers, separated by tabs: the
  factors that training ends with, nominally in [0, 1]. They become a mask by stage 2's rounding
  (`select_channels.round_survivors`).

The files may come from anywhere: nothing in them is executed.
"""

import datetime
import hashlib
import io
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_leank.core.bounded import read_bounded
from vllm_leank.core.geometry import Geometry
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.errors import MaskError, mask_error
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.select_channels import round_survivors
from vllm_leank.mask.tsv import parse_tsv
from vllm_leank.version import __version__

SINK, RECENT = 128, 768
"""Dense tokens that the official code deploys its masks with."""

MAX_BYTES = 64 << 20
"""Largest file that is read: 25 bytes a channel for four times the largest model of today."""

SLACK = 0.25
"""How far factors may lie outside [0, 1]: training clips them before a step, not after it."""


def import_mask(
    source: Path,
    model_path: str,
    *,
    ratio: float | None = None,
    align: int = 32,
    sink: int = SINK,
    recent: int = RECENT,
    model_id: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Mask:
    """The mask of a `.pth` or `.tsv` file, for a checkpoint's directory or hub id.

    Of the checkpoint only its config is read. `ratio`, the quantile of factors to prune, is for
    `.tsv` files and required there. `model_id` is what the mask is found by, by default the name of
    the checkpoint.

    Raises:
        UserError: the file or the model cannot be used, they do not fit each other, or an argument
            is out of range. Faults of the file are a `MaskError`.
    """
    if source.suffix not in (".pth", ".tsv"):
        raise MaskError("is neither a .pth mask nor a .tsv file of factors", path=source)
    if source.suffix == ".pth" and ratio is not None:
        raise UserError("--ratio is for .tsv files: a .pth mask is taken as it is")
    if source.suffix == ".tsv" and ratio is None:
        raise UserError(f"{source}: factors need --ratio, the share of the K channels to prune")
    if ratio is not None and not 0 <= ratio <= 1:
        raise UserError(f"ratio is {ratio}; it must lie between 0 (keep all) and 1 (prune all)")
    checkpoint = Checkpoint.open(model_path, model_id, overrides=overrides)
    geometry = checkpoint.geometry
    # Reports a bad align, window or model id before it looks at the file.
    Mask.full(geometry, model=checkpoint.id, align=align, sink=sink, recent=recent)

    data = _read(source)
    provenance: dict[str, Any] = {"method": "import", "source": source.name}
    provenance["source_sha256"] = hashlib.sha256(data).hexdigest()
    if ratio is None:
        keep = _read_mask(data, source, geometry)
    else:
        keep = round_survivors(_read_factors(data, source, geometry), ratio, align)
        provenance |= {"ratio": float(ratio), "achieved": round(1 - float(keep.mean()), 6)}
    provenance["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    provenance["vllm_leank"] = __version__
    try:
        return Mask.from_keep(
            keep,
            geometry,
            model=checkpoint.id,
            align=align,
            sink=sink,
            recent=recent,
            provenance=provenance,
        )
    except MaskError as error:
        raise MaskError(error.reason, path=source, loc=error.loc) from error


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise MaskError("no such file", path=path)
    return read_bounded(path, MAX_BYTES, "masks", mask_error)


def _check_unpacked(data: bytes, path: Path) -> None:
    """Refuse archives that unpack to more than a mask has; torch.save packs nothing."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise MaskError(f"is damaged: {error}", path=path) from error
    if size > MAX_BYTES:
        raise MaskError(f"unpacks to {size} bytes; masks have at most {MAX_BYTES}", path=path)


def _read_mask(data: bytes, path: Path, geometry: Geometry) -> npt.NDArray[np.bool_]:
    """The tensor of a `.pth` file as bool `[L, H, D]`."""
    import torch

    if zipfile.is_zipfile(io.BytesIO(data)):
        _check_unpacked(data, path)
    try:
        with warnings.catch_warnings(action="ignore"):
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        raise MaskError(
            "is not a plain tensor written by torch.save; damaged, or it holds other objects "
            "(which are never executed)",
            path=path,
        ) from error
    if (
        type(value) is not torch.Tensor
        or value.layout is not torch.strided
        or value.device.type != "cpu"
        or value.is_quantized
    ):
        raise MaskError(f"holds a {type(value).__name__}, not one dense tensor", path=path)
    shape = geometry.shape
    if tuple(value.shape) != shape:
        raise MaskError(f"has shape {tuple(value.shape)}; the model takes {shape}", path=path)
    if not bool(((value == 0) | (value == 1)).all()):
        raise MaskError("has other values than 0 and 1", path=path)
    keep: npt.NDArray[np.bool_] = value.bool().numpy()
    return keep


def _read_factors(data: bytes, path: Path, geometry: Geometry) -> npt.NDArray[np.float64]:
    """The numbers of a `.tsv` file, clipped to [0, 1], float64 `[L, H, D]`."""
    try:
        factors = parse_tsv(data)
    except ValueError as error:
        raise MaskError(
            f"is not a table of numbers separated by tabs: {error}", path=path
        ) from error
    layers, heads, head_dim = geometry.shape
    if factors.shape != (layers, heads * head_dim):
        raise MaskError(
            f"has {factors.shape[0]} lines of {factors.shape[1]} numbers; the model takes {layers} "
            f"of {heads * head_dim} ({heads} KV heads of {head_dim})",
            path=path,
        )
    if not ((factors >= -SLACK) & (factors <= 1 + SLACK)).all():
        raise MaskError(
            "has values that are no scaling factors: they lie between 0 and 1", path=path
        )
    return factors.clip(0, 1).reshape(layers, heads, head_dim)
