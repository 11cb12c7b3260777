"""Hundreds of preemptions and prefix hits: equal tokens all the same."""

import pytest
from engines import engine
from test_engine_answers import (
    assert_same,
    coded_mask,
    kept_mask,
    long,
    prompts_of,
    tolerance_of,
)

pytestmark = pytest.mark.engine


@long
@pytest.mark.parametrize("mask_of", [kept_mask, coded_mask])
def test_a_hundred_preemptions(tiny_llama, mask_of):
    """A pool hardly larger than one request, for many at once. Of one layer: all share their pages'
    tables, so that another would only take its time. Some preemptions are in
    `test_engine_answers.py`.
    """
    prompts = prompts_of([20 + 37 * i % 80 for i in range(68)], seed=1)
    model = tiny_llama(layers=1)
    mask = mask_of(model)
    with engine(model, mask, max_model_len=512, max_num_seqs=64) as leank:
        unpressed = leank.generate(prompts, 350)
        blocks = leank.plan.blocks_in_prefill(leank.window, 512)
    with engine(
        model, mask, enable_prefix_caching=True, max_model_len=512, max_num_seqs=16,
        num_gpu_blocks_override=blocks + 2,
    ) as leank:  # fmt: skip
        outputs_lost = leank.watch_preemptions()
        assert_same(leank.generate(prompts, 350), unpressed, tolerance_of(mask))
        assert leank.block_pool.get_num_free_blocks() == leank.block_pool.num_gpu_blocks - 1
    least = 50 if mask.is_packed else 100  # far codes hardly fill a pool
    assert len(outputs_lost) >= least
    crossing = sum(lost > 64 for lost in outputs_lost)
    assert crossing >= least / 5, "replays do not cross boundaries"


@long
def test_two_hundred_prefix_hits(tiny_llama_dir):
    """Shared beginnings of every length around pages, archive pages and boundaries, with tails of
    none, one and more tokens. Some of them are in `test_engine_answers.py`.
    """
    mask = kept_mask(tiny_llama_dir)
    (document,) = prompts_of([640], seed=2)
    tails = [[], *prompts_of([1, 40], seed=3)]
    edges = [32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512, 576]
    prompts = [
        document[:edge + offset] + tail for edge in edges for offset in (-1, 0, 1, 5, 33)
        for tail in tails
    ]  # fmt: skip
    limits = {"max_model_len": 1024, "max_num_seqs": 32}
    with engine(tiny_llama_dir, mask, **limits) as leank:
        expected = leank.generate(prompts, 40)
    with engine(tiny_llama_dir, mask, enable_prefix_caching=True, **limits) as leank:
        leank.generate([document], 1)
        hits = leank.watch_hits()
        assert_same(leank.generate(prompts, 40), expected, tolerance_of(mask))
    assert sum(hit > 0 for hit in hits) >= 180
    assert len(set(hits)) >= 8
