"""Engines with speculative decoding, and what becomes of their drafts."""

import multiprocessing
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from engines import engine
from recall.demo import MODEL

from vllm_leank.mask.lookup import find_masks

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 6,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
SUFFIX = {"method": "suffix", "num_speculative_tokens": 16}
DRAFT = {"method": "draft_model", "model": str(MODEL), "num_speculative_tokens": 6}
"""The model drafts for itself, from its dense window alone."""

SINK, RECENT = 32, 64


@contextmanager
def own_process():
    """Give `run(function, *arguments)`, each run in a new process: where vLLM's n-gram drafter has
    been imported (and with it llvmlite), vLLM 0.32 cannot start another engine on CPU.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


LENGTHS = (40, 97, 128, 200, 255, 300, 416, 777, 650, 700)
FEW = (40, 97, 128, 200, 255, 300)
"""Lengths of prompts: all, and some."""


def prompts(lengths):
    """Those of some lengths of texts that repeat themselves, not always exactly: the model goes on
    likewise, and drafts are right and wrong. Lengths lie around pages and boundaries. What the last
    two texts repeat lies behind the dense window.
    """
    rng = random.Random(0)
    texts = []
    for length in LENGTHS:
        repeated = rng.randrange(10, 40) if len(texts) < 8 else 220
        period = [rng.randrange(100, 4000) for _ in range(repeated)]
        text = []
        while len(text) < length:
            text += [rng.randrange(100, 4000) if rng.random() < 0.06 else t for t in period]
        texts.append(text[:length])
    return [text for text in texts if len(text) in lengths]


def watch(running):
    """What becomes of drafts from now on; `rolled back` are steps whose rejected drafts had moved
    the boundary.
    """
    scheduler, seen = running.scheduler, Counter()
    make_stats = scheduler.make_spec_decoding_stats

    def count(stats, *, num_draft_tokens, num_accepted_tokens, request_id, **rest):
        computed = scheduler.requests[request_id].num_computed_tokens
        rejected = num_draft_tokens - num_accepted_tokens
        boundary = running.window.boundary
        seen["accepted"] += num_accepted_tokens
        seen["rejected"] += rejected
        seen["rolled back"] += boundary(computed + rejected) > boundary(computed)
        return make_stats(
            stats,
            num_draft_tokens=num_draft_tokens,
            num_accepted_tokens=num_accepted_tokens,
            request_id=request_id,
            **rest,
        )

    scheduler.make_spec_decoding_stats = count
    return seen


def answers(speculation, arguments, lengths):
    """Tokens and log-probabilities of answers to prompts of such lengths, what became of drafts,
    and preemptions, of an engine.
    """
    (mask,) = find_masks(str(MODEL))
    with engine(
        MODEL, mask.path, sink=SINK, recent=RECENT, speculative_config=speculation,
        **{"max_model_len": 1024, **arguments},
    ) as running:  # fmt: skip
        seen = watch(running)
        if speculation is None or "model" not in speculation:
            # A draft model also computes drafts that were rejected, whose slots nobody writes. With
            # NaN there its next drafts are worse; no answer is.
            running.poison_freed_blocks()
        preempted = running.watch_preemptions()
        results = running.generate(prompts(lengths), 160)
        return results, seen, len(preempted)
