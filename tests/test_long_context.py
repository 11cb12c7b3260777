"""What steps of a million tokens read and what fits, on paper: from the sum of its parts."""

import json
from dataclasses import astuple
from operator import itemgetter
from pathlib import Path

import long_context
import pytest

from vllm_leank.core.reads import layer_reads, step_reads
from vllm_leank.core.selection import SEGMENT

MILLION = 1 << 20
RESULTS = Path(__file__).parents[1] / "benchmarks/results/long_context.json"


def test_a_million_dense_tokens_of_the_8b_shape():
    """32 layers of 8 heads, K and V, 128 channels of 2 bytes; TP shares the heads."""
    for tp in (1, 4, 8):
        row = long_context.row("llama-3.1-8b", tp, MILLION, None, None, 1e12)
        assert row["bytes"] == MILLION * 32 * 8 * 2 * 128 * 2 // tp
        assert row["ms"] == pytest.approx(row["bytes"] / 1e9)


@pytest.mark.parametrize(("tp", "bits"), [(1, 4), (4, 2), (8, 1)])
def test_what_a_step_reads_is_the_sum_of_its_parts(tp, bits):
    """Of dense tokens, of codes with their scales, and of leads: counted by hand."""
    settings = long_context.settings("llama-3.1-8b", tp, bits, 0.1, "exact")
    plan, window, selection = settings.plan, settings.window, settings.selection
    boundary = window.boundary(MILLION)
    far, heads = boundary - window.sink, 8 // tp
    dense = (MILLION - far) * heads * 2 * 128 * 2
    segments = -(-far // SEGMENT)
    share = selection.count(segments) / segments
    assert share == pytest.approx(0.1, rel=1e-3)
    of_rank = step_reads(plan, window, MILLION, selection)
    assert of_rank.window == 32 * dense
    assert sum(astuple(of_rank)) == of_rank.total
    # The channels with most bits, in 30 layers.
    profile = plan.profiles[2][0]
    lead = next(
        count * wide // 8 for wide, count in zip((8, 4, 2), profile.k[1:], strict=True) if count
    )
    assert of_rank.lead == 30 * far * heads * lead
    # Codes of so many bits in the mean, and 2 bytes for the scale of V.
    codes = far * heads * (2 * 128 * bits // 8 + 2)
    expected = 2 * codes + 30 * share * codes
    assert of_rank.far == pytest.approx(expected, rel=1e-3)
    layer = layer_reads(plan.layer(2), window, MILLION)
    assert layer.lead == 0
    assert layer.far > 9 * layer_reads(plan.layer(2), window, MILLION, selection).far


def test_results_are_what_the_plan_says_today():
    results = json.loads(RESULTS.read_text())
    rate = results["rate_tb_s"] * 1e12
    names = "shape", "tensor_parallel_size", "length", "bits", "pages"
    kept = [one for one in results["rows"] if itemgetter(*names)(one)[1:3] == (4, MILLION)]
    assert len(kept) == 14
    for one in kept:
        today = long_context.row(*itemgetter(*names)(one), rate)
        assert json.loads(json.dumps(today)) == one
