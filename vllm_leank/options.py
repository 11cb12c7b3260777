"""The options of `--additional-config '{"leank": {...}}'`."""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from vllm_leank.errors import UserError

KEY = "leank"


class OptionError(UserError):
    """An option, or a combination of options, that cannot work: what, why, and what to change."""


class Options(pydantic.BaseModel):
    """What a user may set.

    Attributes:
        mask: path of a mask file; by default the one shipped for the model.
        sink: first tokens that stay dense, a multiple of 32; by default the mask's.
        recent: last tokens that stay dense, at least 32; by default the mask's.
        archive_dtype: what far tokens are stored in: the model's dtype ("auto") or 8-bit floats.
        prefill: how prompts are read: with full attention ("exact") or as answers are ("pruned").
    """

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    mask: str | None = pydantic.Field(default=None, min_length=1)
    sink: int | None = None
    recent: int | None = None
    archive_dtype: Literal["auto", "fp8"] = "auto"
    prefill: Literal["exact", "pruned"] = "exact"


def parse_options(additional_config: Any) -> Options:
    """Read and check the `leank` entry of vLLM's `additional_config`.

    Raises:
        OptionError: unknown keys or values of the wrong type, each named.
    """
    given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        raise OptionError(
            f'additional_config["{KEY}"] is {given!r}, but must be a mapping of options, '
            f'for example {{"{KEY}": {{"sink": 64}}}}'
        )
    try:
        return Options(**given)
    except pydantic.ValidationError as error:
        raise OptionError("; ".join(map(_explain, error.errors()))) from None
    except TypeError:
        raise OptionError(f'additional_config["{KEY}"]: option names must be strings') from None


def given_options(additional_config: Any) -> bool:
    """Whether any leank options were given."""
    return isinstance(additional_config, Mapping) and KEY in additional_config


def _explain(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        allowed = ", ".join(Options.model_fields)
        return f'leank has no option "{name}"; allowed: {allowed}'
    return f"leank option {name} = {error['input']!r}: {error['msg'].lower()}"
