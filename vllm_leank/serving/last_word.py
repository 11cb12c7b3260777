"""What a user sees first and last where leank refuses to start: one sentence, around a traceback.

vLLM raises refusals through pydantic and its own layers, whose traceback hides them.
"""

import shlex
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_leank.core.options import OptionError

_before: list[Any] = [sys.excepthook]
"""The hook that ours has replaced."""


def say_it_last() -> None:
    """Have a refusal that ends this process said before and after its traceback."""
    if sys.excepthook is not _hook:  # libraries for command lines set their own
        _before[0] = sys.excepthook
        sys.excepthook = _hook


def sentence(error: OptionError) -> str:
    """The refusal, and the command that tells the rest without starting anything."""
    words = sys.argv[1:] if Path(sys.argv[0]).name in ("vllm", "main.py") else []
    line = shlex.join(words) if words[:1] == ["serve"] else "serve MODEL --attention-backend leank"
    return f"{error}\nTo see everything that would be refused, at once: leank doctor -- vllm {line}"


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    refusal = _refusal(error)
    if refusal is None:
        _before[0](kind, error, trace)
        return
    print(f"leank: {sentence(refusal)}", file=sys.stderr, flush=True)
    _before[0](kind, error, trace)
    print(f"\nleank: {sentence(refusal)}", file=sys.stderr, flush=True)


def _refusal(error: BaseException) -> OptionError | None:
    """The refusal that an exception is, or that pydantic has wrapped in it."""
    import pydantic

    if isinstance(error, pydantic.ValidationError):
        error = error.errors()[0].get("ctx", {}).get("error", error)
    return error if isinstance(error, OptionError) else None
