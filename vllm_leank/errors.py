"""The one kind of error that is the user's to fix."""

import unicodedata
from typing import Any


class UserError(ValueError):
    """Says what is wrong and what to do; command-line tools print it without a traceback.

    Its message can always be printed, whatever a file, or its name, is made of.
    """

    def __init__(self, *reasons: str) -> None:
        super().__init__(*map(printable_lines, reasons))


def printable(text: str) -> str:
    r"""A text that terminals and files can hold, on one line, whatever a file or its name has.

    What steers a terminal, turns the direction of writing or cannot be seen is written as in
    Python: `\x1b`, `\u202e`, `\n`.
    """
    return text if text.isprintable() else "".join(map(_printable, text))


def printable_lines(text: str) -> str:
    """The same of a text that may have several lines."""
    return "\n".join(map(printable, text.split("\n")))


def _printable(character: str) -> str:
    """A character itself, if it can be seen or is a wide space, or how Python writes it."""
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode()


def shortened(value: Any) -> str:
    """A value as messages show it, 60 characters at most."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write numbers of thousands of digits
        return "what has a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
