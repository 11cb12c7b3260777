"""Options that are several numbers."""

from typing import Any

from vllm_leank.errors import UserError


def numbers(text: str, kind: type) -> list[Any]:
    """Numbers with commas between them.

    Raises:
        UserError: they are something else.
    """
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{text!r}: {error}; give numbers with commas between them") from error
