"""The one kind of error that is the user's to fix."""

from typing import Any


class UserError(ValueError):
    """Says what is wrong and what to do; command-line tools print it without a traceback.

    Its message can always be printed, whatever bytes a file's name is made of.
    """

    def __init__(self, *reasons: str) -> None:
        super().__init__(*map(printable, reasons))


def printable(text: str) -> str:
    """A text that terminals and files can hold, whatever bytes a file's name in it is made of."""
    return text.encode(errors="backslashreplace").decode()


def shortened(value: Any) -> str:
    """A value as messages show it, 60 characters at most."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write numbers of thousands of digits
        return "what has a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
