"""Speculative decoding: drafts are checked over the archive, and rejected ones leave no trace."""

from functools import cache
from importlib.util import find_spec

import pytest
from speculation import DRAFT, FEW, LENGTHS, NGRAM, SUFFIX, answers, own_process
from test_engine_answers import assert_same, long

pytestmark = pytest.mark.engine

DRAFTERS = [
    pytest.param(NGRAM, id="text"),
    pytest.param(DRAFT, id="model"),
    pytest.param(
        SUFFIX,
        id="suffix",
        marks=pytest.mark.skipif(
            find_spec("arctic_inference") is None, reason="needs arctic-inference 0.1.1"
        ),
    ),
]


@pytest.fixture(scope="module")
def run():
    """Give `answers`, in this process where vLLM lets it be: another one costs ten seconds."""
    with own_process() as elsewhere:

        def run(speculation, *arguments):
            if speculation in (None, DRAFT):
                return answers(speculation, *arguments)
            return elsewhere(answers, speculation, *arguments)

        yield run


@pytest.fixture(scope="module")
def plain(run):
    """Give answers without speculation."""

    @cache
    def plain_answers(lengths, **arguments):
        results, seen, _ = run(None, arguments, lengths)
        assert not seen
        return results

    return plain_answers


MORE_THAN = {FEW: (30, 0), LENGTHS: (100, 5)}
"""Drafted tokens that are accepted, and that are rejected, and steps that are rolled back."""
CHUNKED = {"max_num_batched_tokens": 256}
PREEMPTED = {"num_gpu_blocks_override": 50, "enable_prefix_caching": True}
TIGHT = PREEMPTED | {"num_gpu_blocks_override": 24, "max_model_len": 480}


ALL = {"chunked": (CHUNKED, LENGTHS), "preempted": (PREEMPTED, LENGTHS)}


@pytest.mark.parametrize(
    ("drafter", "arguments", "lengths"),
    [
        # A drafter from text needs a process of its own.
        pytest.param(DRAFT, TIGHT, FEW, id="model-few"),
        *(
            pytest.param(*one.values, *kind, id=f"{one.id}-{name}", marks=[*one.marks, long])
            for one in DRAFTERS
            for name, kind in ALL.items()
        ),
    ],
)
def test_tokens_are_those_without_speculation(run, plain, drafter, arguments, lengths):
    results, seen, preempted = run(drafter, arguments, lengths)
    tokens, steps = MORE_THAN[lengths]
    assert min(seen["accepted"], seen["rejected"]) > tokens
    assert seen["rolled back"] > steps
    assert bool(preempted) == ("num_gpu_blocks_override" in arguments)
    assert_same(results, plain(lengths), 1e-3)


PRUNED = {"prefill": "pruned", "max_num_batched_tokens": 256, "max_num_seqs": 4}


@pytest.mark.parametrize(
    ("drafter", "lengths"),
    [
        pytest.param(DRAFT, FEW, id="model-few", marks=long),
        *(
            pytest.param(*one.values, LENGTHS, id=one.id, marks=[*one.marks, long])
            for one in DRAFTERS
        ),
    ],
)
def test_where_prompts_are_read_pruned(run, plain, drafter, lengths):
    results, seen, _ = run(drafter, PRUNED | {"enable_prefix_caching": True}, lengths)
    assert min(seen["accepted"], seen["rejected"]) > MORE_THAN[lengths][0]
    assert_same(results, plain(lengths, **PRUNED), 1e-3)
