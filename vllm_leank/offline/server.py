"""A `vllm serve` that runs while something is measured."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence

from vllm_leank.errors import UserError

START_SECONDS = 1800
"""A large model is read from a slow disk, and CUDA graphs are made."""

STDERR = 2
"""File descriptor: stdout is for results."""


@contextlib.contextmanager
def serving(words: Sequence[str], seconds: float = START_SECONDS) -> Iterator[str]:
    """The address of `vllm serve WORDS`, on a free port; its log goes to stderr.

    Raises:
        UserError: it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # -P as for a script: modules are not looked for in the working directory.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", *words]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=STDERR)
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", time.monotonic() + seconds)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], health: str, deadline: float) -> None:
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=10):
            return
        time.sleep(0.5)
    raise UserError("the server did not start; its log is above")
