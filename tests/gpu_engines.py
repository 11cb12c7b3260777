"""What tests of engines on a GPU share: how these are started, and how near answers must be."""

import numpy as np
import pytest
import torch

ON_GPU = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "max_model_len": 8192 + 256,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": 4 << 30,
    "gpu_memory_utilization": 0.1,  # asks only that so much is free
}

SINK, RECENT = 32, 64

TIE = 0.125
"""Difference of log-probabilities that rounding can make: logits of 8 to 16 have steps of 1/16 in
bf16, and either one may be a step off."""


V2, V1 = "1", "0"


def runners(*cases):
    """Parameters `(runner, ...)`."""
    names = {V2: "v2", V1: "v1"}
    return [
        pytest.param(
            *case, id="-".join([names[case[0]], *(one for one in case[1:] if isinstance(one, str))])
        )
        for case in cases
    ]


def assert_same_up_to_ties(*answers):
    for (some, some_logprobs), (others, others_logprobs) in zip(*answers, strict=True):
        first = next((i for i in range(len(some)) if some[i] != others[i]), None)
        # From a tie on, the two go different ways.
        compared = slice(0, None if first is None else first + 1)
        np.testing.assert_allclose(
            others_logprobs[compared], some_logprobs[compared], rtol=0, atol=TIE, equal_nan=False
        )


def mean_error(answers, prompts, oracle, exact_until=None):
    """Of the log-probabilities that an engine gave its own tokens, against the oracle's in fp32."""
    return errors_of(answers, prompts, oracle, exact_until).mean().item()


def errors_of(answers, prompts, oracle, exact_until=None):
    """Of the log-probabilities that an engine gave its own tokens, the distances from the oracle's,
    in fp32.
    """
    errors = []
    for prompt, (tokens, logprobs) in zip(prompts, answers, strict=True):
        first = len(prompt) if exact_until is None else exact_until
        expected = oracle.position_logprobs(prompt + tokens, first)[-len(tokens) :]
        errors.append(torch.tensor(logprobs) - expected)
    return torch.cat(errors).abs()
