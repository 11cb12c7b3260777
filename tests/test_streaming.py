"""Streaming heads: what each head loses without far tokens, and masks in which some see none."""

import numpy as np
import pytest
import torch
from tiny_models import wide_llama

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.options import Options
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.bits import check_bits
from vllm_leank.mask.file import load_mask
from vllm_leank.mask.lookup import mask_of_bits
from vllm_leank.mask.settings import plan_settings
from vllm_leank.offline.allocate import allocate, by_variance
from vllm_leank.offline.attention_hook import hooked_attention
from vllm_leank.offline.context import Context, logits, read_prompt
from vllm_leank.offline.divergence import divergence
from vllm_leank.offline.far_attention import far_attention
from vllm_leank.offline.fisher import QUERIES
from vllm_leank.offline.streaming import head_losses, streaming_heads

WINDOW = Window(sink=32, recent=32)


@pytest.fixture
def model():
    return wide_llama()


def prompt(tokens):
    return torch.randint(97, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


def test_heads_that_far_tokens_do_not_matter_to_are_the_first(model):
    """One whose output nobody reads, and one whose output is the same without far tokens."""
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 32:] = 0
        model.model.layers[0].self_attn.v_proj.weight[:16] = 0
    losses = head_losses(model, [prompt(300), prompt(340), prompt(80)], WINDOW)
    assert losses.shape == (2, 2)
    assert losses[1, 1] == losses[0, 0] == 0
    assert losses[0, 1] > 0
    assert losses[1, 0] > 0
    found = streaming_heads(losses, 0.5)
    assert found.heads.tolist() == [[True, False], [False, True]]
    assert found.provenance["heads"] == 2
    assert found.provenance["nats_per_token"] == 0
    third = streaming_heads(losses, 0.75).provenance["nats_per_token"]
    least = min(losses[0, 1], losses[1, 0])
    assert third == pytest.approx(least / 2 / QUERIES, rel=0.01)


class Partly:
    """An attention hook under which one head gives up a part of what it has of far tokens."""

    def __init__(self, context, at, part):
        self.context, self.at, self.part = context, at, part

    def __call__(self, layer, query, key, value, attention_mask, scaling, sink_scores):
        parts = [self.context.key(layer), key], [self.context.value(layer), value]
        full = far_attention(query, *parts, WINDOW, scaling=scaling)
        if layer != self.at[0]:
            return full
        blind = torch.tensor([head == self.at[1] for head in range(2)])
        without = far_attention(query, *parts, WINDOW, blind=blind, scaling=scaling)
        return full + self.part * (without - full)


def test_losses_are_twice_the_divergence_of_small_parts(model):
    ids, part = prompt(300), 0.02
    losses = head_losses(model, [ids], WINDOW, draws=150)
    context = Context(Geometry.from_hf_config(model.config))
    read_prompt(model, context, ids[:-QUERIES], 4096)
    seen = np.zeros((2, 2))
    for at in np.ndindex(2, 2):
        found = []
        for one in (0.0, part):
            with torch.no_grad(), hooked_attention(
                model, Partly(context, at, one), context=context
            ):  # fmt: skip
                found.append(logits(model, context, ids[-QUERIES:]).double())
        seen[at] = divergence(*found).total / part**2
    assert losses.sum() / 2 == pytest.approx(seen.sum(), rel=0.2)
    assert (losses.argsort(axis=None) == seen.argsort(axis=None)).all()


def test_bits_are_those_of_the_other_heads():
    rng = np.random.default_rng(0)
    costs = [by_variance(np.exp(2 * rng.normal(size=(6, 4, 128)))) for _ in range(2)]
    blind = rng.random((6, 4)) < 0.5
    found = allocate(*costs, 2, blind=blind)
    bits = found.k_bits.astype(int) + found.v_bits
    assert not bits[blind].any()
    assert (bits[~blind].sum(-1) > 0).all()
    assert 1.9 < bits[~blind].mean() / 2 <= 2
    check_bits(found.k_bits, found.v_bits, (6, 4, 128))  # few enough profiles, with the empty one
    others = allocate(*[{k: c[~blind][None] for k, c in cost.items()} for cost in costs], 2, 7)
    assert (found.k_bits[~blind] == others.k_bits[0]).all()


def test_the_empty_profile_is_one_of_those_that_are_allowed():
    rng = np.random.default_rng(0)
    shapes = (6, 4, 1), (6, 4, 128)
    costs = [by_variance(np.exp(sum(2 * rng.normal(size=s) for s in shapes))) for _ in range(2)]
    blind = rng.random((6, 4)) < 0.5

    def profiles(most):
        found = allocate(*costs, 2, most, blind=blind)
        sides = np.concatenate([found.k_bits, found.v_bits], 1).reshape(6, 2, 4, 128)
        counts = [(sides == kind).sum(-1).swapaxes(1, 2) for kind in (0, 2, 4, 8)]
        heads = np.concatenate(counts, -1).reshape(24, -1)
        return len(np.unique(heads, axis=0))

    assert profiles(30) > 4
    assert profiles(4) == 4


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), 1, 0.9])
def test_shares_that_no_mask_can_have(share):
    with pytest.raises(UserError, match=r"must lie between 0|leaves none of 4 heads"):
        streaming_heads(np.ones((2, 2)), share)


ASKED = ["--prompts", 2, "--max-tokens", 700, "--sink", 32, "--recent", 32, "--device", "cpu"]


def sees(mask):
    return mask.k_bits.any(-1) | mask.v_bits.any(-1)


def test_from_a_model_to_a_mask_with_streaming_heads(leank, with_tokenizer, home):
    code, out, err = leank(
        "mask", "calibrate", with_tokenizer, "--bits", 4, "--streaming", 0.5, *ASKED
    )
    assert code == 0, err
    path = home / "Tiny-1B-4bit-0.5streaming.yaml"
    assert f"{path}: " in out
    assert "2 of 4 heads see no far tokens" in out
    mask = load_mask(path)
    assert sees(mask).sum() == 2
    assert 1.75 < mask.bits <= 2  # 4 bits in half of the heads
    told = mask.provenance["streaming"]
    assert (told["share"], told["heads"]) == (0.5, 2)
    assert told["nats_per_token"] > 0
    assert "gradients times what the head's output loses" in told["by"]
    plan = plan_settings(mask, Options(), itemsize=2).plan
    assert plan.archive_token_bytes < plan.dense_token_bytes * 2.5 / 16
    # It is none of 4 bits, which somebody asks for who wants no streaming heads.
    assert mask_of_bits(str(with_tokenizer), mask.geometry, 4) is None


def test_pruned_channels_of_the_other_heads(leank, with_tokenizer, tmp_path):
    asked = ["--ratio", 0.5, "--align", 16, "--streaming", 0.25, "--out", tmp_path / "m.yaml"]
    code, out, err = leank("mask", "calibrate", with_tokenizer, *asked, *ASKED)
    assert code == 0, err
    mask = load_mask(tmp_path / "m.yaml")
    assert (~sees(mask)).sum() >= 1
    assert mask.keep.sum() == 3 * 64 // 2  # half of what three heads have
    assert "(50.00% asked of the others)" in out
    assert mask.provenance["streaming"]["heads"] == 1
