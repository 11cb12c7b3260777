"""Files of the user's, read once and only up to a limit."""

from pathlib import Path

from vllm_leank.errors import UserError


def read_bounded(path: Path, limit: int, what: str) -> bytes:
    """All bytes of a file of at most `limit` bytes; `what` is how messages call such files.

    Raises:
        UserError: it cannot be read, or is larger.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not a file name: {error}") from error
    if len(data) > limit:
        raise UserError(f"{path}: larger than {limit} bytes, the limit for {what}")
    return data
