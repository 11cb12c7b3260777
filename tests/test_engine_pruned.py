"""Engines in which prompts are read as answers are: the definition with `exact_until` 0."""

import numpy as np
import pytest
import torch
from engines import engine
from format_samples import mask_for
from oracle import Oracle
from test_engine_answers import (
    FEW,
    KEPT,
    MANY,
    all_logprobs,
    assert_same,
    coded_mask,
    kept_mask,
    long,
    prompts_of,
    tolerance_of,
)

from vllm_leank.core.formats import NATIVE, known_formats

pytestmark = pytest.mark.engine

SINK, RECENT = 32, 64


def oracle_of(running, model, mask, **kind):
    assert not running.window.exact
    return Oracle(model, mask, SINK, running.window.recent, **kind)


@pytest.mark.parametrize("archive_format", known_formats(), ids=lambda one: one.name)
@pytest.mark.parametrize("chunk", [100, pytest.param(8192, marks=long)])
def test_logits_are_those_of_the_definition(tiny_llama_dir, chunk, archive_format):
    """Of the prompt and of 200 decode steps, in memory that is NaN where nothing was written."""
    mask = mask_for(archive_format, tiny_llama_dir, KEPT)
    (prompt,) = prompts_of([700], seed=7)
    with engine(
        tiny_llama_dir, mask, prefill="pruned", max_logprobs=512,
        max_num_batched_tokens=chunk,
    ) as leank:  # fmt: skip
        leank.memory.fill_(torch.nan)
        tokens, logprobs, prompt_logprobs = all_logprobs(leank.llm, prompt, 200)
        oracle = oracle_of(leank, tiny_llama_dir, mask, archive_format=archive_format)
    found = torch.cat((prompt_logprobs, logprobs))
    expected = oracle.logits(prompt + tokens[:-1], exact_until=0).log_softmax(-1)
    # Sums in another order may round a number of another archive to the other neighbour.
    assert (found - expected).square().mean().sqrt() < 1e-3
    if archive_format == NATIVE:
        assert torch.allclose(found, expected, atol=1e-3)
    # It matters that prompts are read pruned.
    exact = oracle.logits(prompt + tokens[:-1], exact_until=700).log_softmax(-1)
    assert not torch.allclose(found, exact, atol=1e-1)


@pytest.mark.parametrize(
    ("mask_of", "lengths", "chunks"),
    [
        pytest.param(coded_mask, FEW, (33,), marks=long),
        pytest.param(coded_mask, MANY, (33, 512), marks=long),
        pytest.param(kept_mask, MANY, (33, 512), marks=long),
    ],
)
def test_history_does_not_matter(tiny_llama_dir, mask_of, lengths, chunks):
    """Whole, chunked, and in batches of any size: equal tokens."""
    prompts = prompts_of(lengths)
    mask = mask_of(tiny_llama_dir)
    limits = {"max_model_len": 2048, "prefill": "pruned"}
    with engine(tiny_llama_dir, mask, max_num_batched_tokens=8192, **limits) as leank:
        whole = leank.generate(prompts, 100)
        assert_same(
            [leank.generate([prompt], 100)[0] for prompt in prompts], whole, tolerance_of(mask)
        )
    for chunk in chunks:
        with engine(tiny_llama_dir, mask, max_num_batched_tokens=chunk, **limits) as leank:
            assert_same(leank.generate(prompts, 100), whole, tolerance_of(mask))


@long
@pytest.mark.parametrize("mask_of", [coded_mask, kept_mask])
def test_preemption_does_not_matter(tiny_llama_dir, mask_of):
    """Requests go on from pages of their own prompts and answers, and from each other's."""
    prompts = prompts_of([30, 300, 33, 200, 96, 250, 128, 64])
    prompts += [[*prompt, 1] for prompt in prompts]
    mask = mask_of(tiny_llama_dir)
    limits = {"max_model_len": 1024, "prefill": "pruned", "max_num_batched_tokens": 64}
    with engine(tiny_llama_dir, mask, **limits) as leank:
        unpressed = leank.generate(prompts, 400)
        in_flight = leank.llm.llm_engine.vllm_config.max_in_flight_tokens
        one_request = leank.plan.blocks_in_prefill(leank.window, 1024, in_flight)
    with engine(
        tiny_llama_dir, mask, enable_prefix_caching=True, num_gpu_blocks_override=one_request + 1,
        **limits,
    ) as leank:  # fmt: skip
        outputs_lost, hits = leank.watch_preemptions(), leank.watch_hits()
        assert_same(leank.generate(prompts, 400), unpressed, tolerance_of(mask))
        pool = leank.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert sum(lost > 64 for lost in outputs_lost) >= 3, outputs_lost
    assert sum(hit > 0 for hit in hits) >= 3, hits


@pytest.mark.parametrize(
    ("mask_of", "lengths", "max_tokens"),
    [
        (coded_mask, [790, 3, 150], 40),
        pytest.param(coded_mask, [500, 40, 150, 3, 333], 150, marks=long),
        pytest.param(kept_mask, [500, 40, 150, 3, 333], 150, marks=long),
    ],
)
def test_answers_are_found_as_well(tiny_llama_dir, mask_of, lengths, max_tokens):
    """A conversation: each turn's prompt holds the answer before it."""
    mask = mask_of(tiny_llama_dir)
    turns = prompts_of(lengths, seed=5)

    def talk(leank):
        history, answers = [], []
        for turn in turns:
            history = history + turn
            answers += leank.generate([history], max_tokens)
            history = history + answers[-1][0]
        return answers

    with engine(tiny_llama_dir, mask, prefill="pruned") as leank:
        expected = talk(leank)
    with engine(tiny_llama_dir, mask, prefill="pruned", enable_prefix_caching=True) as leank:
        hits = leank.watch_hits()
        assert_same(talk(leank), expected, tolerance_of(mask))
        page, window = leank.plan.archive_block, leank.window
    # All that was computed, with an archive of whole pages; an answer's last token was not.
    told = [int(told) - 1 for told in np.cumsum([len(turn) + max_tokens for turn in turns])[:-1]]
    assert hits == [0, *(window.prefix(length, page) for length in told)]


@long
@pytest.mark.parametrize("mask_of", [kept_mask, coded_mask])
@pytest.mark.parametrize("chunk", [64, 1024])
def test_a_prompt_holds_no_dense_middle(tiny_llama_dir, mask_of, chunk):
    """What a long prompt holds at most is what vLLM was told when it looked at its memory."""
    mask = mask_of(tiny_llama_dir)
    (prompt,) = prompts_of([4000])
    with engine(
        tiny_llama_dir, mask, prefill="pruned", max_num_batched_tokens=chunk, max_model_len=4096
    ) as leank:
        config = leank.llm.llm_engine.vllm_config
        most = leank.plan.blocks_in_prefill(leank.window, 4096, config.max_in_flight_tokens)
        expected = leank.generate([prompt], 60)
    assert most < leank.plan.blocks_held(leank.window, 4096, exact_until=4097) / 1.5
    with engine(
        tiny_llama_dir, mask, prefill="pruned", max_num_batched_tokens=chunk, max_model_len=4096,
        num_gpu_blocks_override=most + 1,
    ) as leank:  # fmt: skip
        preempted = leank.watch_preemptions()
        assert_same(leank.generate([prompt], 60), expected, tolerance_of(mask))
        assert not preempted
