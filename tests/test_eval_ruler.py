"""`leank eval ruler`: the command lines it makes of lm_eval, and what it refuses."""

import contextlib
import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from vllm_leank.cli import evaluation
from vllm_leank.errors import UserError
from vllm_leank.offline import ruler
from vllm_leank.offline.ruler import SYNTHETIC, chosen_tasks
from vllm_leank.offline.server import free_port


def parsed(line):
    """The options of a command line, by name; those of `--model_args` as a mapping."""
    words = shlex.split(line)
    assert words[:6] == [sys.executable, "-P", "-m", "lm_eval", "--model", "local-completions"]
    options = dict(zip(words[4::2], words[5::2], strict=True))
    options["--model_args"] = dict(
        pair.split("=", 1) for pair in options["--model_args"].split(",")
    )
    return options


def test_each_length_has_a_command_line_of_its_own(leank, tmp_path):
    code, out, _ = leank(
        "eval", "ruler", "org/name", "--base-url", "http://there:9000/v1/", "--tasks", "synthetic",
        "--lengths", "4096,131072", "--limit", 20, "--out", tmp_path / "a b", "--dry-run",
    )  # fmt: skip
    assert code == 0
    first, second = map(parsed, out.splitlines())
    assert first == {
        "--model": "local-completions",
        "--model_args": {
            "model": "org/name",
            "base_url": "http://there:9000/v1/completions",
            "tokenizer": "org/name",
            "tokenizer_backend": "huggingface",
            "tokenized_requests": "False",
            "num_concurrent": "32",
            "max_length": "4352",
            "timeout": "3600",
        },
        "--tasks": ",".join(SYNTHETIC),
        "--metadata": '{"max_seq_lengths": [4096]}',
        "--limit": "20",
        "--output_path": str(tmp_path / "a b" / "4096"),
    }
    assert json.loads(second["--metadata"]) == {"max_seq_lengths": [131072]}
    assert second["--model_args"]["max_length"] == str(131072 + 256)


def test_what_is_not_given_is_left_to_lm_eval(leank):
    _, out, _ = leank("eval", "ruler", "served", "--tokenizer", "/m", "--dry-run")
    lines = [parsed(line) for line in out.splitlines()]
    assert [line["--tasks"] for line in lines] == ["ruler"] * 4
    assert lines[0]["--model_args"]["tokenizer"] == "/m"
    assert not {"--limit", "--output_path"} & set(lines[0])


def test_tasks_may_be_named_alone_and_together():
    assert chosen_tasks("ruler_vt,ruler_qa_squad") == ("ruler_vt", "ruler_qa_squad")
    assert chosen_tasks("synthetic,ruler_vt") == SYNTHETIC
    with pytest.raises(UserError, match="names none"):
        chosen_tasks(",")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lengths", "4k"], "--lengths is '4k'"),
        (["--lengths", "0"], "--lengths is '0'"),
        (["--tokenizer", "a,b"], "no commas in tokenizer"),
        (["--compare", "dense", "--base-url", "http://localhost:8000"], "exclude each other"),
        (["--compare", "dense", "--mask", "m.yaml"], "--mask would change nothing"),
    ],
)
def test_bad_options_are_refused(leank, args, message):
    code, _, err = leank("eval", "ruler", "m", *args, "--dry-run")
    assert code == 2
    assert message in err


def test_without_lm_eval_it_says_what_to_install(leank, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        ruler.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name)
    )
    code, _, err = leank("eval", "ruler", "m")
    assert code == 2
    assert "missing: lm_eval" in err
    assert "pip install 'lm_eval[api,ruler]'" in err


@pytest.fixture
def server():
    """A server's address, and its answer, which tests may change; `status` is the answer's."""
    said = {"data": [{"id": "m"}, {"id": "other"}]}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.path == "/v1/models"
            self.send_response(said.get("status", 200))
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1", said
        running.shutdown()


def test_a_server_is_asked_for_the_model_first(leank, monkeypatch, server):
    monkeypatch.setattr(ruler, "require_lm_eval", lambda: None)
    asked = []
    monkeypatch.setattr(evaluation, "_scores", lambda run, _: asked.append(run) or [(1024, {})])
    url, said = server
    ruler_of = "eval", "ruler", "--base-url", url, "--lengths", 1024
    code, _, err = leank(*ruler_of, "x")
    assert code == 2
    assert f"the server at {url[:-3]} has no x, but m, other" in err
    for base_url, reason in (
        (f"http://127.0.0.1:{free_port()}", "Connection refused"),
        ("localhost:8000", "unknown url type"),
        ("http://a b", "can't contain control characters"),
    ):
        code, _, err = leank("eval", "ruler", "m", "--base-url", base_url)
        assert code == 2
        assert f"no server answers at {base_url}" in err
        assert reason in err
    assert not asked
    assert leank(*ruler_of, "m")[0] == 0
    # What does not answer as vLLM does is left to lm_eval.
    said["status"] = 401
    assert leank(*ruler_of, "x")[0] == 0
    said["status"] = 200
    said["data"] = "none"
    assert leank(*ruler_of, "x")[0] == 0
    assert len(asked) == 3


def test_lengths_run_one_after_the_other_until_one_fails(leank, monkeypatch, server):
    monkeypatch.setattr(ruler, "require_lm_eval", lambda: None)
    ran = []

    class Done:
        returncode = 3

    def run(command, **_):
        ran.append(command)
        out = Path(command[command.index("--output_path") + 1])
        asked = json.loads(command[command.index("--metadata") + 1])["max_seq_lengths"][0]
        scores = {f"{length},none": 0.5 if length == asked else -1 for length in (1024, 2048, 4096)}
        out.mkdir(parents=True)
        (out / "results_1.json").write_text(json.dumps({"results": {"ruler_vt": scores}}))
        return Done()

    monkeypatch.setattr(evaluation.subprocess, "run", run)
    ruler_of = "eval", "ruler", "m", "--base-url", server[0], "--lengths", "1024,2048"
    code, _, err = leank(*ruler_of)
    assert code == 2
    assert "lm_eval ended with exit code 3" in err
    Done.returncode = 0
    code, out, _ = leank(*ruler_of)
    assert code == 0
    assert len(ran) == 3
    # What came before the failure is shown, too.
    monkeypatch.setattr(Done, "returncode", property(lambda _: 3 * (len(ran) == 5)))
    code, early, err = leank(*ruler_of)
    assert code == 2
    assert "exit code 3" in err
    assert [line.split() for line in early.splitlines() if "ruler_vt" in line] == [
        ["ruler_vt", "1,024", "50.0%"]
    ]
    assert [line.split() for line in out.splitlines() if "ruler_vt" in line] == [
        ["ruler_vt", "1,024", "50.0%"],
        ["ruler_vt", "2,048", "50.0%"],
    ]  # and no row of -1 for 4,096


def test_two_servers_in_one_call(leank, monkeypatch):
    """Each is started, asked the same and stopped before the next."""
    happened = []

    @contextlib.contextmanager
    def serving(words):
        happened.append(words)
        yield "http://there:1"
        happened.append("stopped")

    def scores(run, lengths):
        assert (run.base_url, lengths) == ("http://there:1", [1024])
        yield 1024, {"ruler_vt": 0.75 if "leank" in happened[-1] else 1.0}

    monkeypatch.setattr(ruler, "require_lm_eval", lambda: None)
    monkeypatch.setattr("vllm_leank.offline.server.serving", serving)
    monkeypatch.setattr(evaluation, "_scores", scores)
    asked = ["eval", "ruler", "m", "--compare", "dense,leank", "--lengths", "1024"]
    code, out, err = leank(*asked, "--mask", "m.yaml", "--flags", "--seed 1")
    assert code == 0
    assert [line for line in err.splitlines() if line.startswith("$")] == [
        f"$ vllm serve {shlex.join(words)}" for words in happened[::2]
    ]
    dense = ["m", "--max-model-len", "1280", "--seed", "1"]
    mask = ["--additional-config", '{"leank": {"mask": "m.yaml"}}']
    chosen = [*dense, "--attention-backend", "leank", *mask]
    assert happened == [dense, "stopped", chosen, "stopped"]
    assert ["ruler_vt", "1,024", "100.0%", "75.0%"] in [line.split() for line in out.splitlines()]
    code, out, _ = leank(*asked, "--dry-run")
    assert [line.split()[0] for line in out.splitlines()] == ["vllm", sys.executable] * 2
    code, _, err = leank(*asked[:4], "dense,pruned", "--dry-run")
    assert code == 2
    assert "it takes dense and leank" in err


def test_scores_are_shown_though_the_next_server_fails(leank, monkeypatch):
    @contextlib.contextmanager
    def serving(words):
        if "leank" in words:
            raise UserError("the server did not start; its log is above")
        yield "http://there:1"

    monkeypatch.setattr(ruler, "require_lm_eval", lambda: None)
    monkeypatch.setattr("vllm_leank.offline.server.serving", serving)
    monkeypatch.setattr(evaluation, "_scores", lambda run, _: [(1024, {"ruler_vt": 0.875})])
    code, out, err = leank("eval", "ruler", "m", "--compare", "dense,leank", "--lengths", 1024)
    assert code == 2
    assert "did not start" in err
    assert ["ruler_vt", "1,024", "87.5%"] in [line.split() for line in out.splitlines()]


SERVES = """
import signal, sys, time
from vllm_leank.offline.server import free_port, started

port = free_port()
serve = "import http.server, signal; signal.alarm(30); "
serve += "signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored in the background
serve += "http.server.test("
serve += f"http.server.SimpleHTTPRequestHandler, port={port}, bind='127.0.0.1')"
try:
    with started([sys.executable, "-c", serve], port, log=2) as url:
        print(url, flush=True)
        time.sleep(60)
finally:
    print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, flush=True)
"""


def test_a_server_ends_with_who_started_it(tmp_path):
    (tmp_path / "health").touch()
    command = [sys.executable, "-c", SERVES]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().strip()
        urllib.request.urlopen(f"{url}/health", timeout=10).close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
        assert process.stdout.read() == "True\n"
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(f"{url}/health", timeout=10)
