"""`vllm serve MODEL --attention-backend leank`, from outside, over HTTP."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from recall import evaluate_engine
from recall.demo import MODEL, server
from recall.tasks import make_sample
from transformers import AutoTokenizer

from vllm_leank.mask_resolver import find_masks

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def url():
    with pytest.MonkeyPatch.context() as patch:
        # Set by engines.py for engines in this process; a user's server has a process for it.
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
        with server(max_model_len=2048) as address:
            yield address


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
    arguments = ["--base-url", url, "--samples", "2", "--lengths", "1024"]
    assert evaluate_engine.main(arguments) == 0
    assert f"{url}: 8 of 8 right" in capsys.readouterr().out


def test_metrics_tell_the_mask_and_what_it_saves(url):
    metrics = httpx.get(f"{url}/metrics").text
    (info,) = [line for line in metrics.splitlines() if line.startswith("vllm:leank_mask_info{")]
    assert 'mask="leank/recall"' in info
    assert info.endswith(" 1.0")
    (shipped,) = find_masks(str(MODEL))
    far = 6144 * shipped.far_bytes_share
    assert f'vllm:leank_far_token_bytes{{cache="leank",model_name="recall"}} {far}' in metrics
    assert 'vllm:leank_far_token_bytes{cache="dense",model_name="recall"} 6144.0' in metrics


def test_a_faulty_mask_ends_the_start_with_one_message(tmp_path):
    mask = tmp_path / "mask.yaml"
    mask.write_text("format: leank-mask/1\nmodel: leank/recall\nkeep: all\n")
    result = subprocess.run(
        [
            Path(sys.executable).with_name("vllm"),
            *("serve", MODEL, "--attention-backend", "leank"),
            *("--additional-config", f'{{"leank": {{"mask": "{mask}"}}}}'),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0
    assert f"{mask}, line 3: keep" in result.stdout + result.stderr
