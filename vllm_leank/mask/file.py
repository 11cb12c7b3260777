"""Mask files, format `leank-mask/1`: which K channels far tokens keep, per layer and KV head.

The file is YAML; `masks/README.md` describes it. Reading is strict: whatever the format does not
name is refused with file, line and key, so that a slip never turns into a silently different mask.
"""

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic
import yaml

from vllm_leank.core.atomic import write_atomically
from vllm_leank.core.geometry import Geometry
from vllm_leank.core.pages import MAX_HEAD_DIM
from vllm_leank.core.window import GRANULE
from vllm_leank.errors import UserError
from vllm_leank.mask.strict_yaml import Loc, YamlError, read_strict_yaml

__all__ = ["Geometry", "Mask", "MaskError", "dump_mask", "load_mask", "parse_mask", "save_mask"]

FORMAT = "leank-mask/1"
MAX_BYTES = 2 << 20  # 40 times the largest mask of today: 126 layers, 8 KV heads, 256 channels
_MODEL_ID = re.compile(r"[A-Za-z0-9._-]{1,96}(/[A-Za-z0-9._-]{1,96})?")

BoolArray = npt.NDArray[np.bool_]


class MaskError(UserError):
    """A mask that cannot be used: where the fault is, what it is and what is allowed.

    `path`, `line` (from 1) and `key` (dotted, `layers[3][1]`) are None or "" where there is none.
    """

    def __init__(
        self, reason: str, *, path: Path | None = None, line: int | None = None, loc: Loc = ()
    ) -> None:
        self.reason = reason
        self.path = path
        self.line = line
        self.loc = loc
        self.key = _dotted(loc)
        place = "" if path is None else str(path)
        if line is not None:
            place = f"{place}, line {line}" if place else f"line {line}"
        super().__init__(": ".join(part for part in (place, self.key, reason) if part))


@dataclass(frozen=True, eq=False)
class Mask:
    """A checked mask.

    `keep` is bool `[num_layers, num_kv_heads, head_dim]`, read-only. The number of channels a head
    keeps is a multiple of `align`. `sink` and `recent` are the dense tokens the mask was made for.
    `provenance` names at least the `method`. `sha256` is of the file's bytes, or of `dump_mask`'s
    text for a mask made in memory.

    Raises:
        MaskError: the parts do not fit each other or the format.
    """

    model: str
    geometry: Geometry
    align: int
    sink: int
    recent: int
    provenance: dict[str, Any]
    keep: BoolArray
    evaluation: dict[str, Any] | None = None
    path: Path | None = None
    sha256: str = ""

    def __post_init__(self) -> None:
        keep = np.array(self.keep)
        keep.setflags(write=False)
        object.__setattr__(self, "keep", keep)
        _check(self)
        if not self.sha256:
            digest = hashlib.sha256(dump_mask(self).encode()).hexdigest()
            object.__setattr__(self, "sha256", digest)

    @classmethod
    def full(
        cls,
        geometry: Geometry,
        *,
        model: str = "full",
        align: int = 32,
        sink: int = 64,
        recent: int = 256,
    ) -> "Mask":
        """The mask that keeps every channel."""
        shape = (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim)
        return cls(model, geometry, align, sink, recent, {"method": "full"}, np.ones(shape, bool))

    @classmethod
    def from_keep(
        cls,
        keep: BoolArray,
        geometry: Geometry,
        *,
        model: str,
        provenance: dict[str, Any],
        align: int = 32,
        sink: int = 64,
        recent: int = 256,
        evaluation: dict[str, Any] | None = None,
    ) -> "Mask":
        """A mask from `keep`, bool `[num_layers, num_kv_heads, head_dim]`."""
        return cls(model, geometry, align, sink, recent, provenance, keep, evaluation)

    @property
    def kept_counts(self) -> npt.NDArray[np.int64]:
        """Kept channels of each head, int64 `[num_layers, num_kv_heads]`."""
        return self.keep.sum(axis=-1, dtype=np.int64)

    def kept_channels(self, layer: int, head: int) -> tuple[int, ...]:
        """Indices of the channels that KV head `head` of `layer` keeps, ascending."""
        return tuple(int(channel) for channel in np.flatnonzero(self.keep[layer, head]))

    @property
    def k_kept(self) -> float:
        """Share of the K channels that are kept."""
        return float(self.keep.mean())

    @property
    def v_kept(self) -> float:
        """Share of the heads that keep V: those with at least one K channel."""
        return float((self.kept_counts > 0).mean())

    @property
    def far_bytes_share(self) -> float:
        """Bytes of a far token against dense: K and V weigh the same in a dense cache."""
        return (self.k_kept + self.v_kept) / 2


def load_mask(path: str | os.PathLike[str]) -> Mask:
    """Read a mask file.

    Raises:
        MaskError: no such file, not a regular file, too large, not UTF-8, or not a valid mask.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise MaskError("not a regular file", path=path)
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise MaskError(f"cannot be read: {error.strerror}", path=path) from error
    except ValueError as error:
        if isinstance(error, MaskError):
            raise
        raise MaskError(f"not a file name: {error}", path=path) from error
    if len(data) > MAX_BYTES:
        raise MaskError(f"larger than {MAX_BYTES} bytes, the limit for mask files", path=path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise MaskError("not UTF-8 text", path=path, line=line) from error
    return _parse(text, path, hashlib.sha256(data).hexdigest())


def parse_mask(text: str, path: Path | None = None) -> Mask:
    """Read a mask from the text of a mask file; `path` is what messages call it.

    Raises:
        MaskError: not a valid mask.
    """
    return _parse(text, path, hashlib.sha256(text.encode("utf-8", "replace")).hexdigest())


def dump_mask(mask: Mask) -> str:
    """The text of a mask file. Equal masks give equal text."""
    blocks = [
        f"format: {FORMAT}\n",
        _yaml({"model": mask.model}),
        f"geometry: {_yaml(mask.geometry.as_dict(), flow=True)}",
        f"align: {mask.align}\n",
        f"window: {{sink: {mask.sink}, recent: {mask.recent}}}\n",
        _yaml({"provenance": mask.provenance}),
    ]
    if mask.evaluation is not None:
        blocks.append(_yaml({"evaluation": mask.evaluation}))
    blocks.append("layers:\n")
    for heads in np.packbits(mask.keep, axis=-1):
        blocks.append("  - [" + ", ".join(f'"{head.tobytes().hex()}"' for head in heads) + "]\n")
    return "".join(blocks)


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


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class _GeometryBlock(_Strict):
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float | None
    rope_scaling: dict[str, Any] | None


class _WindowBlock(_Strict):
    sink: int
    recent: int


class _File(_Strict):
    """Names and types of a mask file; what values fit each other is `_check`'s part."""

    format: Literal["leank-mask/1"]
    model: str
    geometry: _GeometryBlock
    align: int
    window: _WindowBlock
    provenance: dict[str, Any]
    evaluation: dict[str, Any] | None = None
    layers: list[list[str]]


_KEYS: dict[Loc, type[_Strict]] = {
    (): _File,
    ("geometry",): _GeometryBlock,
    ("window",): _WindowBlock,
}


def _parse(text: str, path: Path | None, sha256: str) -> Mask:
    lines: dict[Loc, int] = {}
    try:
        value, lines = read_strict_yaml(text)
        file = _typed(value)
        geometry = Geometry(**file.geometry.model_dump())
        _check_geometry(geometry)
        return Mask(
            model=file.model,
            geometry=geometry,
            align=file.align,
            sink=file.window.sink,
            recent=file.window.recent,
            provenance=file.provenance,
            keep=_decode(file.layers, geometry),
            evaluation=file.evaluation,
            path=path,
            sha256=sha256,
        )
    except YamlError as error:
        raise MaskError(error.reason, path=path, line=error.line, loc=error.loc) from error
    except MaskError as error:
        # The fault may be a missing key: then its parent has a line.
        loc = error.loc
        while loc and loc not in lines:
            loc = loc[:-1]
        raise MaskError(error.reason, path=path, line=lines.get(loc), loc=error.loc) from error


def _typed(value: Any) -> _File:
    if not isinstance(value, dict):
        raise MaskError(f"not a mask file: starts no mapping with `format: {FORMAT}`")
    try:
        return _File.model_validate(value)
    except pydantic.ValidationError as error:
        # One fault at a time: another format explains all the rest, a misspelt key a missing one.
        first = min(
            error.errors(include_url=False),
            key=lambda e: (e["loc"] != ("format",), e["type"] != "extra_forbidden"),
        )
        loc = first["loc"]
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(_KEYS[loc[:-1]].model_fields)
            raise MaskError(f"unknown key; allowed here: {allowed}", loc=loc) from error
        if first["type"] == "missing":
            raise MaskError("missing", loc=loc) from error
        reason = first["msg"].removeprefix("Input ")
        if first["type"] in ("dict_type", "model_type"):
            reason = "should be a mapping"
        raise MaskError(f"{_short(first['input'])} {reason}", loc=loc) from error


def _decode(layers: list[list[str]], geometry: Geometry) -> BoolArray:
    """Channels from hex, bool `[L, H, D]`; channel 0 is the top bit of the first digit."""
    _check_count(len(layers), geometry.num_layers, "layers", "num_layers", ("layers",))
    digits = geometry.head_dim // 4
    rows = []
    for i, heads in enumerate(layers):
        _check_count(len(heads), geometry.num_kv_heads, "heads", "num_kv_heads", ("layers", i))
        for j, text in enumerate(heads):
            loc = ("layers", i, j)
            if len(text) != digits:
                raise MaskError(
                    f"has {len(text)} hex digits; head_dim {geometry.head_dim} takes {digits}",
                    loc=loc,
                )
            # bytes.fromhex alone would also take blanks.
            if not re.fullmatch("[0-9a-fA-F]+", text):
                raise MaskError(f"{_short(text)} has other characters than 0-9, a-f", loc=loc)
            rows.append(np.frombuffer(bytes.fromhex(text), np.uint8))
    shape = (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim)
    return np.unpackbits(np.stack(rows), axis=-1).astype(bool).reshape(shape)


def _check_count(found: int, wanted: int, what: str, field: str, loc: Loc) -> None:
    if found != wanted:
        raise MaskError(f"has {found} {what}; geometry.{field} is {wanted}", loc=loc)


def _check(mask: Mask) -> None:
    if not _MODEL_ID.fullmatch(mask.model):
        raise MaskError(
            f"{_short(mask.model)} is no model id; write `org/name`, of letters, digits and . _ -",
            loc=("model",),
        )
    geometry, align = mask.geometry, mask.align
    _check_geometry(geometry)
    if align < 16 or align % 16 or geometry.head_dim % align:
        raise MaskError(
            f"is {align}; it must be a multiple of 16 that divides head_dim {geometry.head_dim}",
            loc=("align",),
        )
    if mask.sink < 0:
        raise MaskError(f"is {mask.sink}; it must be at least 0", loc=("window", "sink"))
    if mask.recent < GRANULE:
        raise MaskError(
            f"is {mask.recent}; it must be at least {GRANULE}, the step of compaction",
            loc=("window", "recent"),
        )
    _check_plain(mask.provenance, ("provenance",))
    method = mask.provenance.get("method")
    if not isinstance(method, str) or not method:
        raise MaskError("must name how the mask was made", loc=("provenance", "method"))
    if mask.evaluation is not None:
        _check_plain(mask.evaluation, ("evaluation",))
    _check_keep(mask.keep, geometry, align)


def _check_geometry(geometry: Geometry) -> None:
    for name in ("num_layers", "num_kv_heads"):
        if getattr(geometry, name) < 1:
            raise MaskError(
                f"is {getattr(geometry, name)}; it must be at least 1", loc=("geometry", name)
            )
    if geometry.head_dim % 32 or not 32 <= geometry.head_dim <= MAX_HEAD_DIM:
        raise MaskError(
            f"is {geometry.head_dim}; it must be a multiple of 32, up to {MAX_HEAD_DIM}",
            loc=("geometry", "head_dim"),
        )
    if geometry.rope_theta is not None and not 0 < geometry.rope_theta < float("inf"):
        raise MaskError(
            f"is {geometry.rope_theta}; it must be positive", loc=("geometry", "rope_theta")
        )
    if geometry.rope_scaling is not None:
        _check_plain(geometry.rope_scaling, ("geometry", "rope_scaling"))
        if not isinstance(geometry.rope_scaling["rope_type"], str):
            raise MaskError("must be text", loc=("geometry", "rope_scaling", "rope_type"))


def _check_keep(keep: BoolArray, geometry: Geometry, align: int) -> None:
    shape = (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim)
    if keep.dtype != np.bool_ or keep.shape != shape:
        raise MaskError(f"keep must be bool of shape {shape}, not {keep.dtype} {keep.shape}")
    counts = keep.sum(axis=-1)
    if (odd := np.argwhere(counts % align)).size:
        i, j = (int(index) for index in odd[0])
        raise MaskError(
            f"keeps {counts[i, j]} channels, which is no multiple of align {align}",
            loc=("layers", i, j),
        )


def _check_plain(value: Any, loc: Loc) -> None:
    """Refuse what would not read back as it was written."""
    if len(loc) > 16:
        raise MaskError("nested too deep", loc=loc[:2])
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise MaskError(f"key {key!r} must be text", loc=loc)
            _check_plain(key, loc)
            _check_plain(item, (*loc, key))
    elif type(value) is list:
        for index, item in enumerate(value):
            _check_plain(item, (*loc, index))
    elif type(value) is str:
        if _UNWRITABLE.search(value):
            raise MaskError(f"{_short(value)} has characters that text files cannot hold", loc=loc)
    elif value is not None and type(value) not in (bool, int, float):
        raise MaskError(f"{type(value).__name__} is not a plain value", loc=loc)
    elif type(value) is float and not np.isfinite(value):
        raise MaskError(f"is {value}; numbers must be finite", loc=loc)


_UNWRITABLE = re.compile("[\ud800-\udfff]")


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        # An object that occurs twice is written twice: the reader takes no anchors.
        return True


def _yaml(value: dict[str, Any], *, flow: bool = False) -> str:
    # Without allow_unicode: PyYAML writes a raw U+0085 and reads it back as a blank.
    return yaml.dump(
        value,
        Dumper=_PlainDumper,
        sort_keys=False,
        default_flow_style=flow,
        width=10**6 if flow else 100,
    )


def _dotted(loc: Loc) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
