"""How many requests fit: what is computed, beside what servers held."""

from pathlib import Path

import pytest
from archive_definition import plan_of
from figures import load

from vllm_leank.cli.sizes import parse_size
from vllm_leank.core.capacity import compare, dense_capacity, estimate_pool, leank_capacity
from vllm_leank.core.options import Options
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.file import load_mask
from vllm_leank.mask.settings import plan_settings

REPO = Path(__file__).parents[1]


def test_capacity_is_that_of_a_server_on_an_h200():
    """What it reported with the mask that LeanK's authors released for Llama-3.1-8B: 47.5 requests
    in decode. Its far tokens have 73,984 bytes, as those of this mask. 46 came to run at once.
    """
    layers = [[64] * 8] * 23 + [[64] * 6 + [128] * 2] + [[0] * 8] * 8
    plan = plan_of(layers, 128, 2)
    assert (plan.archive_token_bytes, plan.archive_block) == (73_984, 64)
    pool = parse_size("110.61GiB")
    found = leank_capacity(plan, Window(128, 768), pool, 32_768)
    assert round(found.in_decode, 1) == 47.5
    assert int(leank_capacity(plan, Window(128, 768), pool, 32_000).at_once) == 46
    assert round(dense_capacity(plan, pool, 32_768).in_decode, 1) == 27.7


def test_short_requests_gain_nothing():
    """Within sink and recent every token is dense; only what blocks leave empty is lost."""
    plan = plan_of([[32, 0], [64, 32]], 64, 2)
    both = compare(plan, Window(64, 256), 2**30, 256, in_flight=1)
    share = plan.dense_token_bytes * 32 / plan.block_bytes
    assert both["leank"].in_decode == pytest.approx(both["vLLM"].in_decode * share, rel=1e-3)
    assert both["leank"].in_decode == both["leank"].in_prefill
    assert both["leank"].at_once == pytest.approx(both["leank"].in_decode)


@pytest.mark.parametrize("model", ["qwen_1.5b", "qwen_0.5b", "smollm2"])
@pytest.mark.parametrize("mask", ["bits_4", "bits_2", "pruned_70"])
def test_as_many_requests_ran_at_once_as_is_said(model, mask):
    """On a GPU, with the masks that ship."""
    results = load(f"serve_{model}_{mask}")
    (one,) = results["variants"]
    loaded = next(
        found
        for path in (REPO / "masks").rglob("*.yaml")
        if (found := load_mask(path)).sha256 == results["mask"]["sha256"]
    )
    settings = plan_settings(loaded, Options(), itemsize=2)
    pool = one["engine"]["num_gpu_blocks"] * settings.plan.block_bytes
    length = results["load"]["prompt_tokens"]
    found = leank_capacity(settings.plan, settings.window, pool, length)
    assert int(found.at_once) == one["concurrent"] == one["peak_running"] < found.in_decode - 2


def test_where_not_even_one_prompt_fits_there_is_a_part_of_it():
    plan, window = plan_of([[32, 0], [64, 32]], 64, 2), Window(64, 256)
    blocks = plan.blocks_in_prefill(window, 8192)
    for share, most in ((0.5, 0.5), (1, 1)):
        found = leank_capacity(plan, window, int(share * blocks) * plan.block_bytes, 8192)
        assert found.at_once == pytest.approx(most, rel=0.01)
        assert found.at_once <= found.in_decode


def test_estimates_name_what_takes_the_memory():
    assert estimate_pool(100, 0.9, 20, 10) == 60
    with pytest.raises(UserError, match=r"weights \(2\.00 GiB\)"):
        estimate_pool(2**30, 0.9, 2**31, 0)
