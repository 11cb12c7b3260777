"""`recall.evaluate_engine` over HTTP, with a server that knows the answers, and its statistics."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from recall import vocab
from recall.evaluate_engine import main, summarise
from recall.tasks import TASKS, make_sample

from vllm_leank.offline.intervals import wilson

NAMES = vocab.tokens()
ARGS = ("--samples", "3", "--lengths", "128", "160", "--tasks", "single", "tracking")


@pytest.mark.parametrize(
    ("right", "n", "expected"),
    [  # by hand, from the formula
        (0, 10, (0.0, 0.2775)),
        (10, 10, (0.7225, 1.0)),
        (5, 10, (0.2366, 0.7634)),
        (255, 256, (0.9782, 0.9993)),
    ],
)
def test_intervals_are_wilsons(right, n, expected):
    assert wilson(right, n) == pytest.approx(expected, abs=1e-4)


def test_a_summary_counts_what_was_lost():
    first = {("single", 64): [True, True, False, True], ("tracking", 64): [True, False]}
    other = {("single", 64): [True, False, True, False], ("tracking", 64): [True, False]}
    summary = summarise(other, first)
    assert (summary["lost"], summary["gained"]) == (2, 1)
    assert (summary["all"]["exact"], summary["all"]["n"]) == (3, 6)
    assert [cell["accuracy"] for cell in summary["cells"]] == [0.5, 0.5]
    assert "lost" not in summarise(first, None)


@contextmanager
def server(wrong=()):
    """Answers the samples of `ARGS` rightly, but the first of each task in `wrong`."""
    known = {}
    for task in TASKS:
        for length in (128, 160):
            for seed in range(3):
                sample = make_sample(task, length, seed)
                words = [NAMES[token] for token in sample.answer_token_ids[:-1]]
                if task in wrong and seed == 0:
                    words[-2:] = words[:1]
                known[tuple(sample.prompt_token_ids)] = " ".join(words)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply({"object": "list", "data": [{"id": "recall", "object": "model"}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = known.get(tuple(asked["prompt"]))
            if text is None:
                self.reply({"error": {"message": "the prompt is too long"}}, 400)
                return
            assert (asked["model"], asked["temperature"]) == ("recall", 0)
            choice = {"index": 0, "text": " " + text, "finish_reason": "stop"}
            self.reply({"object": "text_completion", "choices": [choice]})

        def reply(self, value, status=200):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *args):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()


def test_servers_are_compared(tmp_path, capsys):
    out = tmp_path / "results.json"
    with server() as dense, server(wrong=["tracking"]) as leank:
        arguments = ["--base-url", dense, f"{leank}/v1/", *ARGS, "--out", str(out)]
        assert main([*arguments, "--commit", "abc"]) == 0
    results = json.loads(out.read_text())
    first, second = results["variants"]
    assert (first["all"]["exact"], first["all"]["n"]) == (12, 12)
    assert (second["all"]["exact"], second["lost"], second["gained"]) == (10, 2, 0)
    assert [cell["exact"] for cell in second["cells"]] == [3, 3, 2, 2]
    assert second["served_model_name"] == "recall"
    assert results["commit"] == "abc"
    assert "10 of 12 right, 83.3 (55.2-95.3)" in capsys.readouterr().out


def test_a_server_that_cannot_be_asked_ends_in_one_message(capsys):
    with server() as url:
        assert main(["--base-url", url, "--samples", "4", *ARGS[2:]]) == 2
        assert "the prompt is too long" in capsys.readouterr().err
    assert main(["--base-url", url, *ARGS]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"recall.evaluate_engine: {url}/v1: Connection error")
