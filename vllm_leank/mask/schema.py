"""Keys and types of a mask file. Whatever it does not name is refused."""

from typing import Any

import pydantic

from vllm_leank.errors import shortened
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.strict_yaml import Loc


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class _GeometryBlock(_Strict):
    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float | None
    rope_scaling: dict[str, Any] | None
    served_layers: list[int] | None = None
    layers_without_rope: list[int] = []


class _WindowBlock(_Strict):
    sink: int
    recent: int


class _MaskFile(_Strict):
    """What both formats have; what values fit each other is for `checks.py`."""

    format: str
    model: str
    geometry: _GeometryBlock
    window: _WindowBlock
    provenance: dict[str, Any]
    evaluation: dict[str, Any] | None = None


class KeepFile(_MaskFile):
    """A file of `leank-mask/1`: hex digits of the channels that heads keep."""

    align: int
    layers: list[list[str]]


class _Profile(_Strict):
    k: dict[str, int]
    v: dict[str, int]


class _Head(_Strict):
    k: str
    v: str
    k_mean: str = ""
    k_scale: str = ""
    v_mean: str = ""
    v_scale: str = ""


class BitsFile(_MaskFile):
    """A file of `leank-mask/2`: a record of bits and statistics for each head."""

    profiles: list[_Profile]
    layers: list[list[_Head]]


_FORMATS: dict[str, type[KeepFile] | type[BitsFile]] = {
    "leank-mask/1": KeepFile,
    "leank-mask/2": BitsFile,
}


def typed(value: Any) -> KeepFile | BitsFile:
    """The values of a file as its keys and types.

    Raises:
        MaskError: the first fault: a key too many, one too few, or a value of another type.
    """
    known = " or ".join(_FORMATS)
    if not isinstance(value, dict):
        raise MaskError(f"not a mask file: starts no mapping with `format: {known}`")
    if "format" not in value:
        raise MaskError("missing", loc=("format",))
    name = value["format"]
    if not isinstance(name, str) or name not in _FORMATS:
        raise MaskError(f"is {shortened(name)}; it must be {known}", loc=("format",))
    schema = _FORMATS[name]
    try:
        return schema.model_validate(value)
    except pydantic.ValidationError as error:
        # One fault at a time: a misspelt key explains a missing one.
        first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        loc = first["loc"]
        if first["type"] == "extra_forbidden":
            allowed = ", ".join(_block_at(schema, loc[:-1]).model_fields)
            raise MaskError(f"unknown key; allowed here: {allowed}", loc=loc) from error
        if first["type"] == "missing":
            raise MaskError("missing", loc=loc) from error
        reason = first["msg"].removeprefix("Input ")
        if first["type"] in ("dict_type", "model_type"):
            reason = "should be a mapping"
        raise MaskError(f"{shortened(first['input'])} {reason}", loc=loc) from error


def _block_at(schema: type[_Strict], loc: Loc) -> type[_Strict]:
    """The block whose keys stand at a place of a file."""
    blocks: dict[Loc, type[_Strict]] = {
        (): schema,
        ("geometry",): _GeometryBlock,
        ("window",): _WindowBlock,
        ("profiles",): _Profile,
        ("layers",): _Head,
    }
    return blocks[loc[:1]]
