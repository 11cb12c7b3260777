"""Reads fields of a transformers config: an object, or the mapping of a `config.json`."""

from collections.abc import Callable, Mapping
from typing import Any

from vllm_leank.errors import UserError

Get = Callable[[str], Any]
"""Gives a field by name, or None."""


def fields_of(config: Any) -> Get:
    """The fields of a config, of a multimodal one those of its text part."""
    if isinstance(config, Mapping):
        return (config.get("text_config") or config).get
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return lambda name: getattr(config, name, None)


def required(get: Get, name: str) -> int:
    """A number that every config must have.

    Raises:
        UserError: it is missing.
    """
    value = get(name)
    if value is None:
        raise UserError(f"the model's config has no {name}")
    return int(value)
