"""Engines on a GPU: both of vLLM's model runners, with compilation and full CUDA graphs.

Run each test in a process of its own (`benchmarks/reproduce.sh ... engine_tests` does): an engine
leaves compiled graphs and, if it can sleep, an allocator behind, which the next may stumble over.
"""

import numpy as np
import pytest
import torch
from archive_definition import PACKED
from engines import engine
from gpu_engines import (
    ON_GPU,
    RECENT,
    SINK,
    V1,
    V2,
    assert_same_up_to_ties,
    errors_of,
    mean_error,
    runners,
)
from mask_samples import coded_mask, random_mask
from oracle import Oracle
from recall.demo import MODEL
from recall.tasks import TASKS, make_sample
from speculation import DRAFT, LENGTHS, NGRAM, prompts, watch
from test_engine_answers import kept_mask, prompts_of
from transformers import AutoModelForCausalLM

from vllm_leank.core.formats import NATIVE
from vllm_leank.core.selection import Selection
from vllm_leank.mask.file import load_mask, save_mask
from vllm_leank.mask.lookup import find_masks

pytestmark = [pytest.mark.gpu, pytest.mark.engine]


def definition(keep):
    return Oracle(MODEL, keep, SINK, RECENT, device="cuda")


@pytest.mark.parametrize(
    ("runner", "prefill"),
    runners((V2, "exact"), (V2, "pruned"), (V1, "exact")),
    indirect=["runner"],
)
def test_answers_are_as_near_the_definition_as_flash_attention_is(runner, prefill):
    """FlashAttention's distance to dense attention in fp32 is what bf16 costs the model; ours to
    the definition may be no more. Lengths around pages, and chunked prompts.
    """
    prompts = [
        make_sample(task, length, seed).prompt_token_ids[: length - 7 * seed]
        for seed, length in enumerate((256, 300, 1024, 2048, 4096))
        for task in list(TASKS)[seed % 2 :: 2]
    ]
    (mask,) = find_masks(str(MODEL))
    keep = load_mask(mask.path).keep
    exact_until = None if prefill == "exact" else 0
    dense = definition(np.ones_like(keep))
    arguments = ON_GPU | {"max_num_batched_tokens": 2048}
    with engine(MODEL, attention_backend="FLASH_ATTN", **arguments) as running:
        flash = mean_error(running.generate(prompts, 160), prompts, dense)
    with engine(
        MODEL, mask.path, sink=SINK, recent=RECENT, prefill=prefill, **arguments
    ) as running:
        answers = running.generate(prompts, 160)
    assert mean_error(answers, prompts, definition(keep), exact_until) < 1.5 * flash
    # It matters what is read pruned.
    assert mean_error(answers, prompts, dense) > 2 * flash


@pytest.mark.parametrize(
    ("runner", "prefill"),
    runners((V2, "exact"), (V2, "pruned"), (V1, "exact")),
    indirect=["runner"],
)
def test_codes_are_read_as_defined(runner, prefill, tmp_path):
    """A mask of random codes, which changes every answer: the engine's are near the definition's.
    A number at the edge of two codes may take the other one in bf16, so not as near as whole ones.
    """
    prompts = [
        make_sample(task, length, seed).prompt_token_ids[: length - 7 * seed]
        for seed, length in enumerate((300, 1024, 4096))
        for task in TASKS
    ]
    mask = coded_mask(MODEL)
    save_mask(mask, tmp_path / "mask.yaml")
    exact_until = None if prefill == "exact" else 0
    packed = Oracle(MODEL, mask, SINK, RECENT, archive_format=PACKED, device="cuda")
    dense = definition(np.ones_like(mask.keep))
    arguments = ON_GPU | {"max_num_batched_tokens": 2048}
    with engine(
        MODEL, tmp_path / "mask.yaml", sink=SINK, recent=RECENT, prefill=prefill, **arguments
    ) as running:
        answers = running.generate(prompts, 100)
    error = mean_error(answers, prompts, packed, exact_until)
    assert error < 0.1 * mean_error(answers, prompts, dense), error


@pytest.mark.parametrize(
    ("runner", "drafts", "prefill"),
    runners(
        (V2, "text", "exact"),
        (V2, "text", "pruned"),
        (V2, "model", "exact"),
        (V2, "model", "pruned"),
        (V1, "text", "exact"),
        (V1, "model", "pruned"),
    ),
    indirect=["runner"],
)
def test_speculation_changes_no_answer(runner, drafts, prefill):
    """Drafts from the text or by the model itself, some of them wrong, over the archive."""
    (mask,) = find_masks(str(MODEL))
    answers = []
    for config in (None, {"text": NGRAM, "model": DRAFT}[drafts]):
        with engine(
            MODEL, mask.path, sink=32, recent=64, prefill=prefill, speculative_config=config,
            **ON_GPU,
        ) as running:  # fmt: skip
            seen = watch(running)
            answers.append(running.generate(prompts(LENGTHS), 200))
    assert_same_up_to_ties(*answers)
    # vLLM's drafter on GPUs is right more often than the one on CPU.
    assert seen["accepted"] > 100
    assert seen["rejected"] > 20


@pytest.mark.parametrize(
    "runner", [pytest.param(V2, id="v2"), pytest.param(V1, id="v1")], indirect=True
)
def test_a_prompt_whose_last_token_comes_alone_is_read_to_its_end(runner, tmp_path):
    """The token runs in a CUDA graph made for answers. Only the prompt's length, which the graph
    must see anew each time, says that it reads everything; what it needs is in no archive here.
    """
    mask = tmp_path / "hardly_any.yaml"
    save_mask(random_mask(MODEL, [0, 0, 16, 0]), mask)
    samples = [make_sample("single", 2048, seed) for seed in range(16)]
    (length,) = {len(sample.prompt_token_ids) for sample in samples}
    for prefill, least, most in (("exact", 16, 16), ("pruned", 0, 4)):
        with engine(
            MODEL, mask, prefill=prefill, max_num_batched_tokens=length - 1, **ON_GPU
        ) as running:
            # One after the other: a second prompt would share the step.
            answers = [running.generate([sample.prompt_token_ids], 1) for sample in samples]
        first = [tokens[0] for ((tokens, _),) in answers]
        right = sum(
            token == sample.answer_token_ids[0]
            for token, sample in zip(first, samples, strict=True)
        )
        assert least <= right <= most


@pytest.mark.parametrize("runner", runners((V2,), (V1,)), indirect=True)
def test_preempted_requests_answer_as_defined(runner):
    """A cache that is too small for all of them: those thrown out find their prompts in the prefix
    cache again, where another that asks the same still runs, and read what they had said once more.

    That is another step than it was said in, so bf16 rounds otherwise, by up to a nat where the
    model is of two minds. So each request is held against the definition.
    """
    (mask,) = find_masks(str(MODEL))
    asked = [
        make_sample(task, length, 3).prompt_token_ids
        for length in (512, 700, 900, 1100)
        for task in TASKS
        for twin in range(2)
    ]
    options = {"sink": SINK, "recent": RECENT, "enable_prefix_caching": True, **ON_GPU}
    options["max_model_len"] = 2048
    with engine(MODEL, mask.path, **options) as running:
        expected = running.generate(asked, 400)
        one_request = running.plan.blocks_in_prefill(running.window, options["max_model_len"])
    with engine(MODEL, mask.path, num_gpu_blocks_override=2 * one_request, **options) as running:
        outputs_lost, hits = running.watch_preemptions(), running.watch_hits(of_preempted=True)
        answers = running.generate(asked, 400)
    assert sum(lost > RECENT for lost in outputs_lost) >= 3, outputs_lost
    assert any(hits)
    oracle = definition(load_mask(mask.path))
    noise, errors = (
        [mean_error([one], [prompt], oracle) for one, prompt in zip(given, asked, strict=True)]
        for given in (expected, answers)
    )
    assert all(mine < 2 * its for mine, its in zip(errors, noise, strict=True)), (errors, noise)


def test_two_starts_answer_alike():
    """Launches are configured by rule and not by timing, so nothing is left to chance."""
    (mask,) = find_masks(str(MODEL))
    prompts = [
        make_sample(task, length, 5).prompt_token_ids for length in (500, 4000) for task in TASKS
    ]
    answers = []
    for _ in range(2):
        with engine(MODEL, mask.path, sink=mask.sink, recent=mask.recent, **ON_GPU) as running:
            answers.append(running.generate(prompts, 100))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_has_slept_answers_alike(level):
    """Weights, pages and the channels of each layer leave the GPU and come back."""
    (mask,) = find_masks(str(MODEL))
    prompts = [make_sample(task, 2000, 6).prompt_token_ids for task in TASKS]
    with engine(MODEL, mask.path, sink=32, recent=64, enable_sleep_mode=True, **ON_GPU) as running:
        before = running.generate(prompts, 60)
        running.llm.sleep(level)
        running.llm.wake_up(tags=["weights"])
        if level == 2:
            running.llm.collective_rpc("reload_weights")
        running.llm.wake_up(tags=["kv_cache"])
        assert running.generate(prompts, 60) == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("split", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_gpus_answer_like_one(split):
    """Each with its own heads or layers, and archive pages of one size. What the model knows is
    told in equal tokens; where it guesses on, rounding decides, by no more than on one GPU.
    """
    (mask,) = find_masks(str(MODEL))
    samples = [make_sample(task, length, 7) for length in (300, 4000) for task in TASKS]
    prompts = [sample.prompt_token_ids for sample in samples]
    oracle = definition(load_mask(mask.path).keep)
    errors, told = [], []
    for gpus in (1, 2):
        with engine(
            MODEL, mask.path, sink=SINK, recent=RECENT, **{split: gpus}, **ON_GPU
        ) as running:
            answers = running.generate(prompts, 160)
        errors.append(mean_error(answers, prompts, oracle))
        told.append(
            [
                tokens[: len(sample.answer_token_ids)]
                for (tokens, _), sample in zip(answers, samples, strict=True)
            ]
        )
    assert told[0] == told[1] == [sample.answer_token_ids for sample in samples]
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize(
    ("runner", "prefill"),
    runners((V2, "exact"), (V2, "pruned"), (V1, "exact"), (V1, "pruned")),
    indirect=["runner"],
)
def test_needles_are_found(runner, prefill):
    (mask,) = find_masks(str(MODEL))
    right = asked = 0
    with engine(
        MODEL, mask.path, sink=mask.sink, recent=mask.recent, prefill=prefill, **ON_GPU
    ) as running:
        for task in TASKS:
            for length in (1024, 8192):
                samples = [make_sample(task, length, seed) for seed in range(64)]
                prompts = [sample.prompt_token_ids for sample in samples]
                answers = running.generate(prompts, TASKS[task].answer_tokens)
                asked += len(samples)
                right += sum(
                    tokens == sample.answer_token_ids
                    for (tokens, _), sample in zip(answers, samples, strict=True)
                )
    assert right >= 0.99 * asked


@pytest.mark.parametrize("runner", runners((V2,), (V1,)), indirect=True)
def test_needles_are_found_among_the_best_tokens(runner):
    """An eighth of the far tokens and less are read, and drafts of text change nothing."""
    (mask,) = find_masks(str(MODEL))
    samples = [make_sample(task, 8192, seed) for task in TASKS for seed in range(32)]
    asked = [sample.prompt_token_ids for sample in samples]
    answers = []
    for config in (None, NGRAM):
        with engine(
            MODEL, mask.path, sink=mask.sink, recent=mask.recent, pages=768,
            speculative_config=config, **ON_GPU,
        ) as running:  # fmt: skip
            answers.append(running.generate(asked, 24))
    assert_same_up_to_ties(*answers)
    right = sum(
        tokens[: len(sample.answer_token_ids)] == sample.answer_token_ids
        for (tokens, _), sample in zip(answers[0], samples, strict=True)
    )
    assert right >= 0.98 * len(samples)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["codes", "whole channels"])
def test_two_gpus_select_what_one_selects(kind, tiny_llama, tmp_path):
    """Each for its own heads, in a random model that misses what is not read.

    Where rounding turns a choice, one token's error is a hundred times the others': so there are
    prompts enough that means tell something, too. (Of two prompts they are up to 1.7 times as
    large when one engine reads them in other chunks.)
    """
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(layers=8), dtype=torch.float16)
    model.save_pretrained(tmp_path)
    mask, form = coded_mask(tmp_path), PACKED
    if kind == "whole channels":
        mask, form = kept_mask(tmp_path), NATIVE
    asked = prompts_of([1900, 1500] * 8)
    arguments = ON_GPU | {"dtype": "float16", "max_model_len": 2048}
    answers = []
    for gpus in (1, 2):
        with engine(
            tmp_path, mask, sink=SINK, recent=RECENT, pages=256, tensor_parallel_size=gpus,
            **arguments,
        ) as running:  # fmt: skip
            answers.append(running.generate(asked, 60))

    def errors(given, selection):
        oracle = Oracle(tmp_path, mask, SINK, RECENT, archive_format=form, selection=selection)
        return errors_of(given, asked, oracle)

    one, two = (errors(given, Selection.of(256)) for given in answers)
    unread = errors(answers[1], None)
    assert two.median() < 1.5 * one.median()
    assert unread.median() > 5 * two.median()
    assert two.mean() < 1.5 * one.mean(), (one.topk(5), two.topk(5))
    assert unread.mean() > 1.5 * two.mean()
