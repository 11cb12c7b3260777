"""The bundled model through the engine: its mask keeps its answers, a random one loses them."""

import numpy as np
import pytest
from engines import engine
from recall.demo import MODEL
from recall.tasks import TASKS, make_sample

from vllm_leank.mask.file import load_mask, save_mask
from vllm_leank.mask.lookup import find_masks
from vllm_leank.mask.mask import Mask

pytestmark = pytest.mark.engine

SAMPLES = {1024: 8, 2048: 4, 4096: 2, 8192: 1}
"""Held-out samples per task at each length, as many tokens at each; more of them stand in
benchmarks/results."""
FEW, SOME = {1024: 2, 2048: 1}, {1024: 4, 2048: 2}


@pytest.fixture(scope="module")
def shipped():
    (mask,) = find_masks(str(MODEL))
    return mask


def accuracy(mask, samples):
    """Share of right answers, over all tasks and lengths."""
    window = {"sink": mask.sink, "recent": mask.recent}
    right = []
    with engine(
        MODEL, mask.path, max_model_len=8192 + 64, kv_cache_memory_bytes=1 << 28, **window
    ) as running:
        for task in TASKS:
            for length, count in samples.items():
                asked = [make_sample(task, length, seed) for seed in range(count)]
                prompts = [sample.prompt_token_ids for sample in asked]
                answers = running.generate(prompts, TASKS[task].answer_tokens)
                right += [
                    tokens == sample.answer_token_ids
                    for (tokens, _), sample in zip(answers, asked, strict=True)
                ]
    return sum(right) / len(right)


def test_the_shipped_mask_prunes_70_percent(shipped):
    assert shipped.provenance["method"] == "learn"
    assert shipped.k_kept <= 0.3


@pytest.mark.parametrize("samples", [FEW, pytest.param(SAMPLES, marks=pytest.mark.long)])
def test_the_shipped_mask_keeps_the_answers(shipped, samples):
    """Dense attention is right in all but 3 of 4096 of them (benchmarks/results)."""
    assert accuracy(shipped, samples) >= 0.99


@pytest.mark.long
def test_a_random_mask_of_the_same_size_loses_them(shipped, tmp_path):
    rng = np.random.default_rng(0)
    keep = np.zeros_like(shipped.keep)
    for index, head in enumerate(keep.reshape(-1, keep.shape[-1])):
        head[rng.permutation(head.size)[: shipped.kept_counts.flat[index]]] = True
    mask = Mask.from_keep(
        keep, shipped.geometry, model="random", provenance={"method": "random"},
        sink=shipped.sink, recent=shipped.recent,
    )  # fmt: skip
    path = tmp_path / "random.yaml"
    save_mask(mask, path)
    assert accuracy(load_mask(path), SOME) < 0.5
