"""The options of `--additional-config '{"leank": {...}}'`."""

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import pydantic

from vllm_leank.core.selection import check_pages
from vllm_leank.core.window import check_recent, check_sink
from vllm_leank.errors import UserError, shortened

KEY = "leank"


RETIRED = "archive_dtype"
"""An option that there was: how far tokens are stored, which the mask alone says now."""

INSTEAD = (
    "is no more: remove it; smaller than 8-bit floats, and nearer to dense attention, is a mask of "
    "bits: leank mask calibrate MODEL --bits 4"
)
"""What is said where it, or a flag of its name, is given."""


class OptionError(UserError):
    """An option, or a combination of options, that cannot work: what, why, and what to change."""


class Options(pydantic.BaseModel):
    """What a user may set.

    Attributes:
        mask: path of a mask file; by default the one shipped for the model.
        sink: first tokens that stay dense, a multiple of 32; by default the mask's.
        recent: last tokens that stay dense, at least 32; by default the mask's.
        prefill: how prompts are read: with full attention ("exact") or as answers are ("pruned").
        pages: what a query reads of far tokens: a share of them, as 0.1, or a number of tokens;
            by default all.
    """

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    mask: str | None = pydantic.Field(default=None, min_length=1)
    sink: Annotated[int, pydantic.AfterValidator(check_sink)] | None = None
    recent: Annotated[int, pydantic.AfterValidator(check_recent)] | None = None
    prefill: Literal["exact", "pruned"] = "exact"
    pages: Annotated[float | int, pydantic.AfterValidator(check_pages)] | None = None


def parse_options(additional_config: Any) -> Options:
    """Read and check the `leank` entry of vLLM's `additional_config`.

    Raises:
        OptionError: unknown keys, and values of the wrong type or out of range, each named.
    """
    options, faults = read_options(additional_config)
    if faults:
        raise OptionError("; ".join(faults.values()))
    return options


def read_options(additional_config: Any) -> tuple[Options, dict[str, str]]:
    """The options that are right, and what is wrong with the others: sentences by name."""
    given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        return Options(), {
            KEY: f'additional_config["{KEY}"] is {shortened(given)}, but must be a mapping of '
            f'options, for example {{"{KEY}": {{"sink": 64}}}}'
        }
    if wrong := misplaced(additional_config):
        return Options(), {KEY: wrong}
    if not all(isinstance(name, str) for name in given):
        return Options(), {KEY: f'additional_config["{KEY}"]: option names must be strings'}
    try:
        return Options(**given), {}
    except pydantic.ValidationError as error:
        faults = {str(one["loc"][0]): _explain(one) for one in error.errors()}
    right = {name: value for name, value in given.items() if name not in faults}
    return Options(**right), faults


def misplaced(additional_config: Any) -> str | None:
    """What is wrong where options were given, but not under "leank"; None where nothing is."""
    if not isinstance(additional_config, Mapping):
        return None
    if RETIRED in additional_config:
        return f"leank option {RETIRED} {INSTEAD}"
    found = [*_misspelled(additional_config)]
    found += [name for name in additional_config if name in Options.model_fields]
    if not found:
        return None
    name = found[0]
    right = additional_config[name] if name not in Options.model_fields else None
    if not isinstance(right, Mapping):
        right = {one: value for one, value in additional_config.items() if one in found}
    form = json.dumps({KEY: right}, default=str)
    return f'--additional-config has "{name}" where "{KEY}" is expected: write \'{form}\''


def given_options(additional_config: Any) -> bool:
    """Whether leank options were given, under "leank" or what must have been meant by it."""
    if not isinstance(additional_config, Mapping):
        return False
    return KEY in additional_config or any(_misspelled(additional_config))


def _misspelled(additional_config: Mapping[Any, Any]) -> Iterator[str]:
    """Keys that nearly say "leank", and those that only leank can have meant."""
    for name, value in additional_config.items():
        if name == KEY or not isinstance(name, str):
            continue
        plain = "".join(letter for letter in name.lower() if letter.isalpha())
        near = difflib.SequenceMatcher(None, plain.removeprefix("vllm"), KEY).ratio() >= 0.8
        is_mask = name == "mask" and str(value).endswith((".yaml", ".yml"))
        if near or is_mask or name == RETIRED:
            yield name


def _explain(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))[:60]
    if error["type"] == "value_error":
        return f"leank option {error['ctx']['error']}"
    if name == RETIRED:
        return f"leank option {RETIRED} {INSTEAD}"
    if error["type"] == "extra_forbidden":
        allowed = ", ".join(Options.model_fields)
        return f"leank has no option {json.dumps(name)}; allowed: {allowed}"
    return f"leank option {name} = {shortened(error['input'])}: {error['msg'].lower()}"
