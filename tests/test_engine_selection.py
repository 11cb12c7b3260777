"""Engines that read the best segments of far tokens alone."""

import pytest
import torch
from archive_definition import PACKED
from engines import engine
from mask_samples import coded_mask
from oracle import Oracle
from test_engine_answers import all_logprobs, kept_mask, prompts_of, tolerance_of

from vllm_leank.core.formats import NATIVE
from vllm_leank.core.selection import SEGMENT, Selection

PAGES = 256

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(tiny_llama):
    """The first two layers read all far tokens, so there are two more."""
    return tiny_llama(layers=4)


@pytest.mark.parametrize("kind", ["codes", "whole channels"])
def test_answers_are_those_of_the_definition(model, kind):
    """In chunks, in memory that is NaN where nothing was written."""
    mask = coded_mask(model) if kind == "codes" else kept_mask(model)
    form = PACKED if kind == "codes" else NATIVE
    (prompt,) = prompts_of([900])
    with engine(model, mask, pages=PAGES, max_logprobs=512, max_num_batched_tokens=300) as leank:
        assert leank.plan.archive_format == form
        assert leank.plan.archive_block % SEGMENT == 0
        leank.memory.fill_(torch.nan)
        tokens, logprobs, _ = all_logprobs(leank.llm, prompt, 60)

    def error(selection):
        oracle = Oracle(model, mask, 32, 64, archive_format=form, selection=selection)
        expected = oracle.logits(prompt + tokens[:-1], exact_until=900).log_softmax(-1)[899:]
        return (logprobs - expected).square().mean().sqrt()

    assert error(Selection.of(PAGES)) < 1e-3
    assert error(None) > 0.02


def assert_alike(one, other, mask):
    """Equal but where two segments are so nearly alike that rounding decides which of them is read:
    at one token of a thousand, and less than what other segments would do.
    """
    assert [tokens for tokens, _ in one] == [tokens for tokens, _ in other]
    logprobs = [torch.cat([torch.tensor(lines) for _, lines in all_of]) for all_of in (one, other)]
    apart = (logprobs[0] - logprobs[1]).abs()
    assert (apart > tolerance_of(mask)).float().mean() <= 1e-3
    assert apart.max() < 0.02


@pytest.mark.long
def test_preemption_prefix_hits_and_drafts_do_not_matter(model):
    mask = coded_mask(model)
    prompts = prompts_of([420, 30, 400, 33, 20, 380, 50, 128, 390, 40, 31, 25, 410, 45, 5, 60])
    prompts.append(prompts[0][:352] + prompts[1])
    limits = {"max_model_len": 640, "max_num_seqs": 16, "pages": PAGES}
    with engine(model, mask, **limits) as leank:
        unpressed = leank.generate(prompts, 200)
        one_request = leank.plan.blocks_in_prefill(leank.window, 640)
    pressed = limits | {"num_gpu_blocks_override": one_request + 2, "enable_prefix_caching": True}
    with engine(model, mask, **pressed) as leank:
        outputs_lost = leank.watch_preemptions()
        assert_alike(leank.generate(prompts, 200), unpressed, mask)
    assert sum(lost > 64 for lost in outputs_lost) >= 2, outputs_lost
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    with engine(model, mask, speculative_config=drafts, **limits) as leank:
        assert_alike(leank.generate(prompts, 200), unpressed, mask)
