"""Keys and types of a mask file. Whatever it does not name is refused."""

from typing import Any, Literal

import pydantic

from vllm_leank.mask.errors import MaskError, shortened
from vllm_leank.mask.strict_yaml import Loc


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


class MaskFile(_Strict):
    """Names and types of a mask file; what values fit each other is for `checks.py`."""

    format: Literal["leank-mask/1"]
    model: str
    geometry: _GeometryBlock
    align: int
    window: _WindowBlock
    provenance: dict[str, Any]
    evaluation: dict[str, Any] | None = None
    layers: list[list[str]]


_KEYS: dict[Loc, type[_Strict]] = {
    (): MaskFile,
    ("geometry",): _GeometryBlock,
    ("window",): _WindowBlock,
}


def typed(value: Any) -> MaskFile:
    """The values of a file as its keys and types.

    Raises:
        MaskError: the first fault: a key too many, one too few, or a value of another type.
    """
    if not isinstance(value, dict):
        raise MaskError("not a mask file: starts no mapping with `format: leank-mask/1`")
    try:
        return MaskFile.model_validate(value)
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
        raise MaskError(f"{shortened(first['input'])} {reason}", loc=loc) from error
