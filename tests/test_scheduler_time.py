"""`benchmarks/scheduler_time.py` times decode steps of an engine."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine


def test_an_engine_is_timed(repo, tmp_path):
    out = tmp_path / "times.json"
    done = subprocess.run(
        [
            *(sys.executable, repo / "benchmarks/scheduler_time.py", "--engines", "leank"),
            *("--requests", "3", "--prompt-tokens", "500", "--steps", "4", "--repeats", "1"),
            *("--out", out),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    results = json.loads(out.read_text())
    (row,) = results["rows"]
    assert (row["engine"], row["requests"]) == ("leank", 3)
    assert 0 < row["schedule_ms"] < 1e3
    assert 0 < row["update_ms"] < 1e3
