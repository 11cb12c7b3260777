"""Servers that benchmarks start one after the other, with the arguments of an engine."""

import contextlib
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from vllm_leank.errors import UserError
from vllm_leank.offline.server import address, free_port, started

VLLM = "-P", "-m", "vllm.entrypoints.cli.main", "serve"
"""What Python is started with to serve."""

CONSOLE = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def flags(engine_args: dict[str, Any]) -> list[str]:
    """Engine arguments, as of `LLM(...)`, as flags of `vllm serve`."""
    words = []
    for name, value in engine_args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


@contextlib.contextmanager
def engine_server(
    model: str,
    engine_args: dict[str, Any],
    *,
    log: Path,
    seconds: float,
    program: Sequence[str] = VLLM,
) -> Iterator[tuple[str, float]]:
    """The address of a server, and the seconds that it took to start; it is stopped on the way out.

    Args:
        model: directory of the model.
        engine_args: as of `LLM(...)`.
        log: takes what the server says.
        seconds: how long it may take to start.
        program: what Python is started with.

    Raises:
        UserError: it does not start.
    """
    port, begin = free_port(), time.monotonic()
    command = [sys.executable, *program, model, *flags(engine_args), *address(port)]
    CONSOLE.print(f"$ {shlex.join(command)} > {log}")
    with log.open("w") as said, contextlib.ExitStack() as stack:
        try:
            run = started(command, port, log=said, seconds=max(seconds, 1))
            url = stack.enter_context(run)
        except UserError as error:
            raise UserError(f"the server did not start; its log is {log}") from error
        start = round(time.monotonic() - begin, 1)
        CONSOLE.print(f"started in {start:.0f} s")
        yield url, start


def leave_in_order(seconds: float | None = None) -> None:
    """From now on end by SIGTERM, or after `seconds`, as by an exception, so that servers are
    stopped; and let servers hear SIGINT, which shells make background programs ignore.
    """

    def leave(number: int, _: Any) -> NoReturn:
        for one in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(one, signal.SIG_IGN)  # stopping takes a while
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGALRM, leave)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if seconds is not None:
        signal.alarm(math.ceil(seconds))
