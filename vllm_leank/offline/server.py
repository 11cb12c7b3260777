"""A server that runs while something is asked of it."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NoReturn

from vllm_leank.errors import UserError

START_SECONDS = 1800
"""A large model is read from a slow disk, and CUDA graphs are made."""

_MOST = 1 << 20
"""Bytes of a list of models that are read."""

STDERR = 2
"""File descriptor: stdout is for results."""


@contextlib.contextmanager
def serving(words: Sequence[str]) -> Iterator[str]:
    """The address of `vllm serve WORDS`, on a free port; its log goes to stderr.

    Raises:
        UserError: it does not start.
    """
    # -P as for a script: modules are not looked for in the working directory.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", *words]
    port = free_port()
    with started([*command, *address(port)], port, log=STDERR) as url:
        yield url


def check_serves(server: str, model: str) -> None:
    """Refuse a server that is not there or has other models, before a long run asks it.

    One that does not list its models as vLLM does is let through: the run will tell.

    Raises:
        UserError: nothing answers, or it has other models.
    """
    try:
        with urllib.request.urlopen(f"{server}/v1/models", timeout=10) as answer:
            text = answer.read(_MOST)
    except urllib.error.HTTPError:  # it may want a key
        return
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"no server answers at {server}: {reason}; start one by vllm serve {model}, or name "
            "another by --base-url"
        ) from error
    try:
        names = [one["id"] for one in json.loads(text)["data"]]
    except (ValueError, TypeError, KeyError):
        return
    if model not in names:
        raise UserError(f"the server at {server} has no {model}, but {', '.join(names)}")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def address(port: int) -> tuple[str, ...]:
    """Options of `vllm serve` to listen to this machine alone."""
    return "--host", "127.0.0.1", "--port", str(port)


@contextlib.contextmanager
def started(
    command: Sequence[str],
    port: int,
    *,
    log: IO[str] | int,
    environment: Mapping[str, str] | None = None,
    seconds: float = START_SECONDS,
) -> Iterator[str]:
    """The address of a server once it is healthy; it is stopped on the way out, which SIGTERM
    takes as well.

    Args:
        command: starts it on `port`.
        log: a file, or its descriptor, for what the server says.
        environment: added to that of this process, where that does not have it.
        seconds: how long it may take to start.

    Raises:
        UserError: it does not start.
    """
    with _exit_on_sigterm():
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment or {}) | os.environ,
            process_group=0,  # a new session would be scheduled apart, and starve its clients
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(process, f"{url}/health", time.monotonic() + seconds)
            yield url
        finally:
            _stop(process)


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Within the context SIGTERM raises SystemExit, with the exit code that shells give it: by
    default it ends this process at once. A handler of somebody else's stays.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _wait(process: subprocess.Popen[bytes], health: str, deadline: float) -> None:
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=10):
            return
        time.sleep(0.5)
    raise UserError("the server did not start; its log is above")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a server end by itself, unless that takes too long or is interrupted once more."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its engine's processes as well
            process.wait()
