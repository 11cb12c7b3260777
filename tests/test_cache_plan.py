"""The page sizes of whole models, in literal numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from archive_definition import PACKED, plan_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_leank.core.capacity import dense_capacity, leank_capacity
from vllm_leank.core.formats import known_formats
from vllm_leank.core.page_sizes import ARCHIVE_WASTE, plan_cache
from vllm_leank.core.plan import rank_heads
from vllm_leank.core.profile import Profile
from vllm_leank.core.window import Window

OFFICIAL_MASKS = Path(__file__).parents[2] / "shared" / "official-masks"

HAND_WRITTEN = ((32, 64, 0, 96), (0, 0, 0, 0), (32, 32, 32, 32), (128, 128, 128, 128))


@pytest.mark.parametrize(
    ("tp_size", "itemsize", "token_bytes", "archive_block", "block_bytes", "dense"),
    [
        (1, 2, 1152 + 1280 + 2048, 64, 286720, 8192),
        (1, 4, 2304 + 2560 + 4096, 64, 573440, 16384),
        (2, 2, 704 + 640 + 1024, 64, 151552, 4096),
        (4, 2, 448 + 320 + 512, 64, 81920, 2048),
        (8, 2, 448 + 320 + 512, 64, 81920, 2048),
    ],
)
def test_plan_of_a_hand_written_mask(
    tp_size, itemsize, token_bytes, archive_block, block_bytes, dense
):
    plan = plan_of(HAND_WRITTEN, 128, itemsize, tp_size)
    assert plan.archive_token_bytes == token_bytes
    assert plan.archive_block == archive_block
    assert plan.block_bytes == block_bytes
    assert plan.dense_token_bytes == dense


def test_layers_of_a_stage_lie_one_behind_the_other():
    plan = plan_of(HAND_WRITTEN, 128, 2)
    assert [plan.archive_offset(index) for index in range(4)] == [
        0, 64 * 1152, 64 * 1152, 64 * 2432
    ]  # fmt: skip
    assert plan.archive_page_bytes == 64 * 4480


def test_every_stage_has_the_page_of_the_largest():
    plan = plan_of(HAND_WRITTEN, 128, 2, stages=(1, 3))
    assert plan.first_layers == (0, 1)
    assert [plan.archive_offset(index) for index in range(4)] == [0, 0, 0, 64 * 1280]
    assert plan.stage_token_bytes == 1280 + 2048
    assert plan.archive_token_bytes == 2 * (1280 + 2048)
    assert plan.block_bytes == 2 * 64 * (1280 + 2048)


def test_an_archive_page_is_never_as_large_as_a_window_page():
    """vLLM would take archive and layer for layers of one kind."""
    plan = plan_of([[128, 128]], 128, 2)
    assert plan.archive_block == 32
    assert plan.archive_page_bytes == 32 * 1024 + 512


@pytest.mark.parametrize(
    ("profile", "archive_block", "token_bytes", "fit"),
    [
        (Profile(k4=128, v4=128), 128, 32 * 1040, 3.81),
        (Profile(k2=128, v2=128), 256, 32 * 528, 7.25),
        (Profile(k2=64, v2=64), 512, 32 * 272, 13.02),
    ],
)
def test_archive_pages_of_llama_fill_a_block_whatever_the_bits(
    profile, archive_block, token_bytes, fit
):
    """Block of 4 MiB; requests of 32K tokens against dense ones."""
    plan = plan_cache(((profile,) * 8,) * 32, 128, 2, archive_format=PACKED)
    assert (plan.archive_block, plan.archive_token_bytes) == (archive_block, token_bytes)
    pool = 64 << 30
    requests = leank_capacity(plan, Window(64, 256), pool, 32768).in_decode
    assert requests / dense_capacity(plan, pool, 32768).in_decode == pytest.approx(fit, abs=0.01)


def official(name):
    path = OFFICIAL_MASKS / f"{name}.pth"
    if not path.exists():
        pytest.skip(f"the official mask {path.name} is not here")
    return torch.load(path, weights_only=True).sum(-1).int().tolist()


@pytest.mark.parametrize(
    ("name", "tp_size", "token", "dense", "archive_block", "block_bytes"),
    [
        ("llama3.1-8b-instruct", 1, 73984, 131072, 64, 4734976),
        ("llama3.1-8b-instruct", 2, 37248, 65536, 64, 2383872),
        ("qwen2.5-7b-instruct", 1, 28032, 57344, 64, 1835008),
        ("qwen2.5-7b-instruct", 2, 14720, 28672, 64, 942080),
    ],
)
def test_plan_of_the_official_masks(name, tp_size, token, dense, archive_block, block_bytes):
    plan = plan_of(official(name), 128, 2, tp_size)
    window = Window(64, 256)
    assert plan.archive_block == archive_block
    assert plan.archive_token_bytes == token
    assert plan.dense_token_bytes == dense
    assert plan.block_bytes == block_bytes
    assert plan.blocks_in_prefill(window, 32768) == 508 + 1024
    assert plan.blocks_in_decode(window, 32768) == 508 + 2 + 8


LEAST = {
    "llama3.1-8b-instruct": (1.72, 1.71, 1.59, 1.46),
    "qwen2.5-7b-instruct": (1.94, 1.89, 1.89, 1.89),
}


@pytest.mark.parametrize(
    ("name", "tp_size", "least"),
    [
        (name, tp_size, least)
        for name, ratios in LEAST.items()
        for tp_size, least in zip((1, 2, 4, 8), ratios, strict=True)
    ],
)
def test_requests_that_fit_against_dense(name, tp_size, least):
    """Of 32K tokens: what one page for all layers of a stage brought."""
    plan = plan_of(official(name), 128, 2, tp_size)
    pool = 64 << 30
    fit = leank_capacity(plan, Window(64, 256), pool, 32768).in_decode
    assert fit / dense_capacity(plan, pool, 32768).in_decode >= least


def test_blocks_of_short_requests():
    plan = plan_of(HAND_WRITTEN, 128, 2)
    window = Window(64, 256)
    assert [plan.blocks_in_prefill(window, n) for n in (1, 320, 351, 352)] == [1, 10, 11, 2 + 11]
    assert [plan.blocks_in_decode(window, n) for n in (1, 320, 351, 352)] == [1, 10, 11, 2 + 10]


masks = st.integers(1, 4).flatmap(
    lambda log_heads: st.lists(
        st.lists(
            st.integers(0, 8).map(lambda n: n * 16), min_size=2**log_heads, max_size=2**log_heads
        ),
        min_size=1,
        max_size=12,
    )
)


@settings(max_examples=200, deadline=None)
@given(
    masks,
    st.sampled_from([1, 2, 4, 8, 16]),
    st.sampled_from(known_formats()),
    st.integers(1, 3),
)
def test_layers_of_every_rank_and_stage_share_a_page_without_overlap(
    mask, tp_size, archive_format, num_stages
):
    num_stages = min(num_stages, len(mask))
    stages = [len(mask) // num_stages] * num_stages
    stages[-1] += len(mask) - sum(stages)
    plan = plan_of(mask, 128, 4, tp_size, archive_format, stages=stages)
    assert plan.archive_block in archive_format.blocks
    for rank in range(tp_size):
        for first, count in zip(plan.first_layers, plan.stages, strict=True):
            end = 0
            for layer in range(first, first + count):
                assert plan.archive_offset(layer, rank) == end
                end += plan.layer(layer, rank).archive_page_bytes
                assert end % 512 == 0
            assert end <= plan.archive_page_bytes
    assert plan.archive_page_bytes > 0


@settings(max_examples=200, deadline=None)
@given(masks, st.sampled_from([1, 2, 4]), st.sampled_from(known_formats()))
@example([[0, 0]], 2, PACKED)  # a page of 1,024 tokens would be as large as a window page
def test_far_tokens_leave_little_of_a_block_empty(mask, tp_size, archive_format):
    plan = plan_of(mask, 128, 2, tp_size, archive_format)
    used = plan.archive_token_bytes * plan.archive_block / plan.block_bytes
    assert used >= 1 - ARCHIVE_WASTE or plan.archive_block == archive_format.blocks[-1]
    step = archive_format.blocks[0]
    if plan.archive_block > step:
        smaller = replace(plan, archive_block=plan.archive_block - step)
        assert smaller.archive_page_bytes <= (1 - ARCHIVE_WASTE) * plan.dense_token_bytes * 32


@pytest.mark.parametrize(
    ("tp_size", "heads"),
    [
        (1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (8, [[0], [1], [2], [3], [4], [5], [6], [7]]),
        (16, [[head] for head in range(8) for _ in range(2)]),
    ],
)
def test_ranks_share_eight_heads(tp_size, heads):
    assert [list(rank_heads(8, tp_size, rank)) for rank in range(tp_size)] == heads
