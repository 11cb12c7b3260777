"""`benchmarks/scheduler_time.py` times decode steps of an engine."""

import json

import pytest
import scheduler_time

pytestmark = pytest.mark.engine


def test_an_engine_is_timed(tmp_path, monkeypatch):
    class Here:
        """Instead of a process of its own, which takes half a minute to begin."""

        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, call, *args):
            self.found = call(*args)
            return self

        def result(self):
            return self.found

    monkeypatch.setattr(scheduler_time, "ProcessPoolExecutor", Here)
    for name in scheduler_time.ENVIRONMENT:
        monkeypatch.setenv(name, "")  # what it sets is undone
    words = "--engines leank --requests 3 --prompt-tokens 500 --steps 4 --repeats 1 --commit x"
    out = tmp_path / "times.json"
    monkeypatch.setattr("sys.argv", ["scheduler_time", *words.split(" "), "--out", str(out)])
    scheduler_time.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["engine"], row["requests"]) == ("leank", 3)
    assert 0 < row["schedule_ms"] < 1e3
    assert 0 < row["update_ms"] < 1e3
