"""Files of the user's, read once and only up to a limit."""

from collections.abc import Callable
from pathlib import Path

from vllm_leank.errors import UserError

Refuse = Callable[[Path, str], UserError]
"""Makes the error that says of a file what is wrong with it."""


def user_error(path: Path, reason: str) -> UserError:
    """The plain one."""
    return UserError(f"{path}: {reason}")


def read_bounded(path: Path, limit: int, what: str, refuse: Refuse = user_error) -> bytes:
    """All bytes of a file of at most `limit` bytes; `what` is how messages call such files.

    Raises:
        UserError: it cannot be read, or is larger; of the kind that `refuse` makes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise refuse(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise refuse(path, f"not a file name: {error}") from error
    if len(data) > limit:
        raise refuse(path, f"larger than {limit} bytes, the limit for {what}")
    return data
