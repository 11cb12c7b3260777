"""`leank serve MODEL --bits 4`: makes a mask, becomes `vllm serve`, and answers over HTTP.

It is started as an example has it, and asked by the examples and by the README's own lines, too.
"""

import importlib.util
import json
import os
import re
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from malformed import requests
from openai import OpenAI
from recall import evaluate_engine
from recall.demo import MODEL, server
from recall.tasks import TASKS, make_sample
from transformers import AutoTokenizer

from vllm_leank.core.options import Options
from vllm_leank.core.window import Window
from vllm_leank.mask.file import load_mask
from vllm_leank.mask.settings import plan_settings

REPO = Path(__file__).parents[1]
DENSE = 6144
"""Bytes of a dense token."""

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def data_home(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def url(data_home):
    prompts = data_home / "prompts.jsonl"  # built-in ones are text, which this model cannot read
    samples = [make_sample(task, 900, seed=77) for task in TASKS]
    lines = [{"prompt_token_ids": one.prompt_token_ids + one.answer_token_ids} for one in samples]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    script = REPO / "examples/calibrate_and_serve.sh"
    # What a compiler would do at startup is a minute's work, and the demo's.
    line = ("sh", str(script), str(MODEL), "--data", str(prompts), "--enforce-eager")
    with pytest.MonkeyPatch.context() as patch:
        # Set by engines.py for engines in this process; a user's server has a process for it.
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
        patch.setenv("XDG_DATA_HOME", str(data_home))
        patch.setenv("BITS", "4")
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        with server(max_model_len=2048, line=line) as address:
            yield address


@pytest.fixture(scope="module")
def mask(url, data_home):
    """The mask that was made for the server."""
    return load_mask(data_home / "vllm-leank/masks/recall-4bit.yaml")


def ask(url, task, length, seed=0, **params):
    """The question as text, the right answer and the endpoint's completion."""
    sample = make_sample(task, length, seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    completion = OpenAI(base_url=f"{url}/v1", api_key="none").completions.create(
        model="recall",
        prompt=tokenizer.decode(sample.prompt_token_ids[1:]),
        max_tokens=32,
        temperature=0,
        **params,
    )
    expected = tokenizer.decode(sample.answer_token_ids, skip_special_tokens=True)
    return completion, expected


@pytest.mark.parametrize("task", ["single", "multikey", "tracking"])
def test_needles_are_found_over_http(url, task):
    completion, expected = ask(url, task, 1500)
    assert completion.choices[0].text.strip() == expected
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.prompt_tokens > 1400


def example(name):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, REPO / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_of_a_client(url, capsys):
    sample = make_sample("multikey", 1000, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompt = tokenizer.decode(sample.prompt_token_ids[1:])
    text = example("openai_client").main(prompt, url)
    expected = tokenizer.decode(sample.answer_token_ids, skip_special_tokens=True)
    assert text.strip() == expected
    assert capsys.readouterr().out.strip() == expected


def test_the_example_of_a_batch_job(url, tmp_path):
    """A second run answers only what the first has not."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    samples = [make_sample("single", 400, seed) for seed in range(3)]
    lines = [
        json.dumps({"id": number, "prompt": tokenizer.decode(one.prompt_token_ids[1:])}) + "\n"
        for number, one in enumerate(samples)
    ]
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    job = example("batch_job")
    source.write_text("".join(lines[:2]))
    assert job.main(str(source), str(target), url) == 2
    source.write_text("".join(lines))
    assert job.main(str(source), str(target), url) == 1
    answers = {one["id"]: one["text"].strip() for one in job.read(target)}
    assert answers == {
        number: tokenizer.decode(one.answer_token_ids, skip_special_tokens=True)
        for number, one in enumerate(samples)
    }


def test_what_the_readme_asks_a_server(url, capsys):
    """As printed, but for the model's name and the port."""
    readme = (REPO / "README.md").read_text()
    readme = readme.replace("http://localhost:8000", url).replace('"MODEL"', '"recall"')
    (curl,) = re.findall(r"^curl .*\n.*", readme, re.MULTILINE)
    words = shlex.split(curl.replace("\\\n", " "))
    headers = dict([words[words.index("-H") + 1].split(": ")])
    reply = httpx.post(words[1], content=words[words.index("-d") + 1], headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert blocks
    assert reply.json()["usage"]["completion_tokens"] > 0
    for block in blocks:
        names = {}
        exec(compile(block, "README.md", "exec"), names)
        assert names["answer"].usage.completion_tokens > 0
        assert capsys.readouterr().out == names["answer"].choices[0].text + "\n"


def test_a_request_that_is_too_long_is_refused_and_the_server_lives(url):
    reply = httpx.post(
        f"{url}/v1/completions",
        json={"model": "recall", "prompt": [5] * 4096, "max_tokens": 4},
        timeout=60,
    )
    assert reply.status_code == 400
    completion, expected = ask(url, "multikey", 1000)
    assert completion.choices[0].text.strip() == expected


def test_the_evaluation_asks_a_running_server(url, capsys):
    arguments = ["--base-url", url, "--samples", "1", "--lengths", "1024"]
    assert evaluate_engine.main(arguments) == 0
    assert f"{url}: 4 of 4 right" in capsys.readouterr().out


def test_the_mask_is_made_from_the_prompts(mask):
    assert 3.75 < mask.bits <= 4
    told = mask.provenance
    assert (told["bits"], told["prompts"], told["max_tokens"]) == (4, 4, 2048)
    assert told["data"] == "prompts.jsonl"


def test_metrics_tell_the_mask_and_what_it_saves(url, mask):
    metrics = httpx.get(f"{url}/metrics").text
    (info,) = [line for line in metrics.splitlines() if line.startswith("vllm:leank_mask_info{")]
    assert f'sha256="{mask.sha256}"' in info
    assert info.endswith(" 1.0")
    far = float(plan_settings(mask, Options(), itemsize=2).plan.archive_token_bytes)
    assert DENSE / 4 < far < DENSE / 3.5
    assert f'vllm:leank_far_token_bytes{{cache="leank",model_name="recall"}} {far}' in metrics
    assert f'vllm:leank_far_token_bytes{{cache="dense",model_name="recall"}} {DENSE}.0' in metrics


def usage(url):
    """What requests hold, from one reply of the server."""
    wanted = {
        "archive": r'leank_tokens\{.*pages="archive"',
        "window": r'leank_tokens\{.*pages="window"',
        "saved": r"leank_saved_bytes\{",
        "compacted": r"leank_compacted_tokens_total\{",
    }
    text = httpx.get(f"{url}/metrics", timeout=60).text
    return {
        name: float(re.search(rf"^vllm:{pattern}.* (\S+)$", text, re.MULTILINE)[1])
        for name, pattern in wanted.items()
    }


def test_metrics_follow_the_requests(url):
    """One request, watched while it generates 200 tokens."""
    before = usage(url)["compacted"]
    body = {
        "model": "recall",
        "prompt": [7] * 600,
        "max_tokens": 200,
        "ignore_eos": True,
        "temperature": 0,
    }
    seen = []
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=300)
        while not reply.done():
            seen.append(usage(url))
            time.sleep(0.05)
    assert reply.result().status_code == 200
    held = max(seen, key=lambda one: one["archive"])
    boundary = Window(64, 256).boundary
    assert boundary(600) - 64 <= held["archive"] <= boundary(800) - 64
    assert held["archive"] % 32 == 0
    assert 320 <= held["window"] < 352
    # Far tokens take a fourth of a dense token's bytes, and blocks are not all full.
    assert 0.5 < held["saved"] / (DENSE * held["archive"]) < 0.75
    assert usage(url) == {
        "archive": 0,
        "window": 0,
        "saved": 0,
        "compacted": before + boundary(799) - 64,
    }


def test_the_dashboard_shows_metrics_that_exist(url, repo):
    dashboard = json.loads((repo / "docs/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for query in queries for name in re.findall(r"vllm:\w+", query)}
    exported = set(re.findall(r"^(vllm:\w+)\{", httpx.get(f"{url}/metrics").text, re.MULTILINE))
    assert names <= exported, names - exported
    assert {name for name in exported if "leank" in name and "created" not in name} <= names


def test_malformed_requests_are_refused_and_the_server_lives(url):
    vocabulary = AutoTokenizer.from_pretrained(MODEL).vocab_size
    with httpx.Client(base_url=url, timeout=60) as client:
        for body in requests(200, "recall", 2048, vocabulary):
            reply = client.post(
                "/v1/completions", content=body, headers={"Content-Type": "application/json"}
            )
            assert 400 <= reply.status_code < 500, (body[:200], reply.text[:300])
            assert "error" in reply.text, body[:200]
    completion, expected = ask(url, "tracking", 1000)
    assert completion.choices[0].text.strip() == expected
