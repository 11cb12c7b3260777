"""What is wrong with a mask, and where."""

from pathlib import Path

from vllm_leank.errors import UserError, printable
from vllm_leank.mask.strict_yaml import Loc


class MaskError(UserError):
    """A mask that cannot be used: where the fault is, what it is and what is allowed.

    `path`, `line` (from 1) and `key` (dotted, `layers[3][1]`) are None or "" where there is none.
    """

    def __init__(
        self, reason: str, *, path: Path | None = None, line: int | None = None, loc: Loc = ()
    ) -> None:
        self.reason = reason
        self.path = path
        self.line = line
        self.loc = loc
        self.key = _dotted(loc)
        place = "" if path is None else printable(str(path))
        if line is not None:
            place = f"{place}, line {line}" if place else f"line {line}"
        super().__init__(": ".join(part for part in (place, self.key, reason) if part))


def mask_error(path: Path, reason: str) -> MaskError:
    """What `read_bounded` says of a file that should be a mask."""
    return MaskError(reason, path=path)


def _dotted(loc: Loc) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return printable(text.removeprefix("."))
