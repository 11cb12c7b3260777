"""Pythons that have imported vLLM and nothing of leank. Importing vLLM takes ten seconds, so one
process does it once, and scripts run in copies of it.
"""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache

IMPORTED = ("vllm.config", "vllm.engine.arg_utils", "vllm.v1.attention.selector")


def run(script: str, *argv: str, env: Mapping[str, str] | None = None) -> str:
    """What the script prints, run with these arguments and, beside this process's, variables.

    Raises:
        AssertionError: it ends with an error.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps({"script": script, "argv": argv, "env": dict(env or {})}) + "\n")
    server.stdin.flush()
    done = json.loads(server.stdout.readline())
    assert done["code"] == 0, done["out"]
    return str(done["out"])


@cache
def _server() -> subprocess.Popen[str]:
    """Ends with this process, which closes its input."""
    return subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in IMPORTED:
        __import__(name)
    assert not [name for name in sys.modules if name.startswith("vllm_leank")]
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryFile("w+") as output:
            pid = os.fork()
            if pid == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os._exit(_run(asked["script"], asked["argv"], asked["env"]))
            _, status = os.waitpid(pid, 0)
            output.seek(0)
            done = {"code": os.waitstatus_to_exitcode(status), "out": output.read()}
        print(json.dumps(done), file=answers, flush=True)


def _run(script: str, argv: Sequence[str], env: Mapping[str, str]) -> int:
    os.environ.update(env)
    sys.argv = ["-c", *argv]
    try:
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    _serve()
