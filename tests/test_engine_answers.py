"""What the engine answers: dense with a full mask, the definition with any other, every time."""

from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from archive_definition import PACKED
from engines import engine, planned_ahead
from mask_samples import coded_mask, full_mask, random_mask, statistics_of
from oracle import Oracle

pytestmark = pytest.mark.engine

long = pytest.mark.long

# Around window pages (32), archive pages, sink + recent (96).
LENGTHS = [1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 300, 511]
LONG_LENGTHS = [*LENGTHS, 777, 1500, 3000, 6000]
LOGPROB_TOLERANCE = 5e-4
"""fp32 on both sides; the order of summation differs."""

KEPT = [0, 32, 16, 48]  # 37.5% of K, and one streaming head in four
SINK, RECENT = 32, 64


def long_but(values, *short):
    """Parameters, long but for some."""
    return [one if one in short else pytest.param(one, marks=long) for one in values]


def kept_mask(model):
    return random_mask(model, KEPT)


def tolerance_of(mask):
    """Where order of summation may make another code of a number at the edge of two, more."""
    return 5e-3 if mask.is_packed else LOGPROB_TOLERANCE


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 512, length).tolist() for length in lengths]


def assert_same(one, other, tolerance=LOGPROB_TOLERANCE):
    for index, ((tokens, logprobs), (others, other_logprobs)) in enumerate(
        zip(one, other, strict=True)
    ):
        assert tokens == others, f"prompt {index}"
        assert logprobs == pytest.approx(other_logprobs, abs=tolerance), f"prompt {index}"


@pytest.fixture(scope="module")
def plain(tiny_llama_dir):
    """Give plain vLLM's answers to prompts of random tokens."""

    @cache
    def answers(lengths, max_tokens):
        with engine(tiny_llama_dir) as running:
            return running.generate(prompts_of(lengths), max_tokens)

    return answers


@pytest.mark.parametrize("prefill", ["exact", "pruned"])
@pytest.mark.parametrize(
    ("lengths", "max_tokens"), [(LENGTHS, 64), pytest.param(LONG_LENGTHS, 128, marks=long)],
    ids=["short", "long"],
)  # fmt: skip
def test_a_full_mask_gives_the_answers_of_plain_vllm(
    tiny_llama_dir, plain, lengths, max_tokens, prefill
):
    with engine(tiny_llama_dir, full_mask(tiny_llama_dir), prefill=prefill) as leank:
        answers = leank.generate(prompts_of(lengths), max_tokens)
    assert_same(answers, plain(tuple(lengths), max_tokens))


@pytest.mark.parametrize(
    ("length", "means"),
    [pytest.param(20, False, marks=long), (200, True), pytest.param(1100, False, marks=long)],
)
def test_logits_are_those_of_the_definition(tiny_llama_dir, length, means):
    """Prefill, and 200 decode steps, which is at least five compactions. Pruned channels are 0, or
    their means.
    """
    mask = random_mask(tiny_llama_dir, KEPT)
    if means:
        mask = mask.with_means(statistics_of(mask.k_bits.shape))
    (prompt,) = prompts_of([length], seed=length)
    with engine(tiny_llama_dir, mask, max_logprobs=512) as leank:
        tokens, logprobs, prompt_logprobs = all_logprobs(leank.llm, prompt, 200)
    oracle = Oracle(tiny_llama_dir, mask, SINK, RECENT)
    expected = oracle.logits(prompt + tokens[:-1], exact_until=length).log_softmax(-1)
    assert torch.allclose(logprobs, expected[length - 1 :], atol=1e-3)
    assert torch.allclose(prompt_logprobs, expected[: length - 1], atol=1e-3)
    # The mask matters here: without it, the same comparison fails.
    dense = Oracle(tiny_llama_dir, np.ones_like(mask.keep), SINK, RECENT)
    unpruned = dense.logits(prompt + tokens[:-1], exact_until=length).log_softmax(-1)
    assert not torch.allclose(logprobs, unpruned[length - 1 :], atol=1e-1)


def test_codes_are_read_as_defined(tiny_llama_dir):
    """A packed archive, in memory that is NaN where nothing was written."""
    mask = coded_mask(tiny_llama_dir)
    (prompt,) = prompts_of([600])
    with engine(tiny_llama_dir, mask, max_logprobs=512) as leank:
        assert leank.plan.archive_format == PACKED
        leank.memory.fill_(torch.nan)
        tokens, logprobs, _ = all_logprobs(leank.llm, prompt, 200)

    def error(kept, **kind):
        oracle = Oracle(tiny_llama_dir, kept, SINK, RECENT, **kind)
        expected = oracle.logits(prompt + tokens[:-1], exact_until=600).log_softmax(-1)[599:]
        return (logprobs - expected).square().mean().sqrt()

    # Sums in another order may make another code of a number at the edge of two.
    assert error(mask, archive_format=PACKED) < 1e-3
    assert error((mask.k_bits | mask.v_bits) > 0) > 0.1


def all_logprobs(llm, prompt, max_tokens):
    """Greedy tokens, and log-probabilities `[tokens, vocabulary]` of output and prompt."""
    from vllm import SamplingParams

    vocabulary = 512
    (output,) = llm.generate(
        [{"prompt_token_ids": prompt}],
        SamplingParams(
            max_tokens=max_tokens,
            temperature=0,
            logprobs=vocabulary,
            prompt_logprobs=vocabulary,
            ignore_eos=True,
            detokenize=False,
        ),
        use_tqdm=False,
    )

    def dense(rows):
        return torch.tensor([[row[token].logprob for token in range(vocabulary)] for row in rows])

    completion = output.outputs[0]
    return list(completion.token_ids), dense(completion.logprobs), dense(output.prompt_logprobs[1:])


FEW = [640, 33, 400, 96, 257]
MANY = [1500, 700, 33, 400, 96, 1000, 257, 640]
"""Lengths of prompts whose history differs."""


@pytest.mark.parametrize(
    ("mask_of", "lengths", "batches", "chunks"),
    [
        (coded_mask, FEW, (1,), (33,)),
        pytest.param(coded_mask, MANY, (1, 2), (32, 33, 100, 512), marks=long),
        pytest.param(kept_mask, MANY, (1, 2), (32, 33, 100, 512), marks=long),
    ],
)
def test_history_does_not_matter(tiny_llama_dir, mask_of, lengths, batches, chunks):
    """Whole, chunked, and in batches of any size: equal tokens."""
    prompts = prompts_of(lengths)
    mask = mask_of(tiny_llama_dir)
    with engine(tiny_llama_dir, mask, max_num_batched_tokens=8192) as leank:
        whole = leank.generate(prompts, 100)
        for batch in batches:
            for start in range(0, len(prompts), batch):
                part = slice(start, start + batch)
                assert_same(leank.generate(prompts[part], 100), whole[part], tolerance_of(mask))
    for chunk in chunks:
        with engine(tiny_llama_dir, mask, max_num_batched_tokens=chunk) as leank:
            assert_same(leank.generate(prompts, 100), whole, tolerance_of(mask))


@pytest.fixture(scope="module")
def unpressed(tiny_llama_dir):
    """Give answers of an engine with room for all requests, and the blocks that one may hold."""

    @cache
    def answers(mask_of, lengths, max_tokens, **limits):
        with engine(tiny_llama_dir, mask_of(tiny_llama_dir), **limits) as leank:
            found = leank.generate(prompts_of(lengths), max_tokens)
            return found, leank.plan.blocks_in_prefill(leank.window, limits["max_model_len"])

    return answers


@long
@pytest.mark.parametrize("mask_of", [kept_mask, coded_mask])
@pytest.mark.parametrize("ahead", [False, True], ids=["step by step", "planned ahead"])
def test_preemption_does_not_matter(tiny_llama_dir, unpressed, mask_of, ahead):
    """Requests thrown out of a cache that is too small, and replayed: equal tokens. Where a step is
    planned while another is in flight, too.
    """
    lengths = (30, 300, 33, 20, 96, 50, 128, 64, 40, 31, 25, 10, 45, 5, 28, 60)
    mask, limits = mask_of(tiny_llama_dir), {"max_model_len": 512, "max_num_seqs": 16}
    expected, one_request = unpressed(mask_of, lengths, 200, **limits)
    with (
        planned_ahead() if ahead else nullcontext(),
        engine(tiny_llama_dir, mask, num_gpu_blocks_override=one_request + 2, **limits) as leank,
    ):
        outputs_lost, in_flight = leank.watch_preemptions(), leank.watch_steps_in_flight()
        assert_same(leank.generate(prompts_of(lengths), 200), expected, tolerance_of(mask))
    replayed_across_a_boundary = [lost for lost in outputs_lost if lost > 64]
    assert len(replayed_across_a_boundary) >= 3, f"preempted after outputs: {outputs_lost}"
    assert (sum(tokens > 0 for tokens in in_flight) > len(in_flight) / 2) == ahead


@pytest.mark.parametrize(
    ("mask_of", "length", "max_tokens"),
    [
        (coded_mask, 512, 40),
        pytest.param(coded_mask, 1024, 100, marks=long),
        pytest.param(kept_mask, 1024, 100, marks=long),
    ],
)
def test_a_prefix_hit_does_not_change_the_answer(tiny_llama_dir, mask_of, length, max_tokens):
    """Hits of many lengths, also of a prompt that contains what another request generated."""
    mask = mask_of(tiny_llama_dir)
    (document,) = prompts_of([length])
    tails = prompts_of([40, 3, 200], seed=5)
    with engine(tiny_llama_dir, mask) as leank:
        first = [document + tail for tail in tails]
        first += [document[:length] for length in (64, 65, 96, 127, 128, 500)]
        expected = leank.generate(first, max_tokens)
        second = [prompt + tokens for prompt, (tokens, _) in zip(first[:3], expected, strict=False)]
        expected += leank.generate(second, 50)
    with engine(tiny_llama_dir, mask, enable_prefix_caching=True) as leank:
        hits = leank.watch_hits()
        answers = [leank.generate([prompt], max_tokens)[0] for prompt in first]
        answers += [leank.generate([prompt], 50)[0] for prompt in second]
        assert_same(answers, expected, tolerance_of(mask))
        page = leank.plan.archive_block
    assert sum(hit >= length // page * page for hit in hits) >= 5, hits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("head_dim", "group"), [(64, 1), (96, 2), (128, 4), (256, 2)], ids=lambda value: str(value)
)
def test_head_sizes_groups_and_dtypes_serve(tiny_llama, head_dim, group, dtype):
    model = tiny_llama(head_dim=head_dim, group=group)
    mask = random_mask(model, [32, 0, head_dim, 64 if head_dim > 64 else 48])
    prompt, *_ = prompts_of([300])
    with engine(model, mask, dtype=dtype, max_model_len=1024) as leank:
        ((tokens, logprobs),) = leank.generate([prompt], 40)
    oracle = Oracle(model, mask.keep, SINK, RECENT)
    expected = oracle.position_logprobs(prompt + tokens, exact_until=len(prompt))[-40:]
    tolerance = {"bfloat16": 0.2, "float16": 0.03, "float32": 1e-3}[dtype]
    assert torch.tensor(logprobs) == pytest.approx(expected, abs=tolerance)
