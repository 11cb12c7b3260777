"""Attention over scaled far keys, against a formula written out for each query and key."""

import itertools
import math

import pytest
import torch

from vllm_leank.core.window import Window
from vllm_leank.offline import far_attention as module
from vllm_leank.offline.far_attention import far_attention

B, H, GROUP, D = 2, 3, 2, 16


def plain(query, key, value, window, factors, blind, scaling, sinks=None, means=None):
    """One query after the other, with a scaled copy of its keys."""
    T, S = query.shape[2], key.shape[2]
    output = torch.zeros(B, T, H * GROUP, D)
    for b, head, i in itertools.product(range(B), range(H * GROUP), range(T)):
        t, kv = S - T + i, head // GROUP
        at = torch.arange(t + 1)
        far = (at >= window.sink) & (at < window.boundary(t + 1))
        own = torch.where(far[:, None], factors[b, kv], 1.0)
        keys = key[b, kv, : t + 1] * own
        if means is not None:
            keys = keys + (1 - own) * means[kv]
        logits = keys @ query[b, head, i] * scaling
        if blind[kv]:
            logits = logits.masked_fill(far, -math.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[head : head + 1]])
        output[b, i, head] = logits.softmax(0)[: t + 1] @ value[b, kv, : t + 1]
    return output


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)

    def make(T, S):
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        query, key, value = draw(B, H * GROUP, T, D), draw(B, H, S, D), draw(B, H, S, D)
        return query * 2, key, value, torch.rand(B, H, D, generator=generator)

    return make


@pytest.mark.parametrize("scores", [1 << 28, 3 * 200 * B * H * GROUP])
@pytest.mark.parametrize(
    ("sink", "recent", "T", "cuts"),
    [
        (32, 32, 7, [150, 200]),
        (32, 32, 70, [130, 131, 200]),
        (0, 64, 5, [40, 195, 200]),
        (64, 32, 90, [90]),
        (32, 96, 3, [90]),
        (64, 32, 8, [40]),
    ],
)
def test_far_keys_are_scaled_for_each_query(tensors, monkeypatch, sink, recent, T, cuts, scores):
    monkeypatch.setattr(module, "SCORES", scores)
    query, key, value, factors = tensors(T, cuts[-1])
    window, blind = Window(sink, recent), torch.tensor([False, True, False])
    sizes = [end - start for start, end in itertools.pairwise([0, *cuts])]
    found = far_attention(
        query, key.split(sizes, 2), value.split(sizes, 2), window, factors, blind, 0.3
    )
    torch.testing.assert_close(
        found, plain(query, key, value, window, factors, blind, 0.3), rtol=1e-5, atol=1e-5
    )


def test_sinks_take_a_part_of_the_weights(tensors):
    query, key, value, factors = tensors(9, 150)
    window, blind = Window(32, 32), torch.tensor([False, True, False])
    sinks = torch.linspace(-1, 7, H * GROUP)
    rest = window, factors, blind, 0.3, sinks
    found = far_attention(query, [key], [value], *rest)
    torch.testing.assert_close(found, plain(query, key, value, *rest), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sink", "recent", "T"), [(32, 32, 70), (0, 64, 5)])
def test_what_is_not_a_keys_own_is_its_mean(tensors, sink, recent, T):
    query, key, value, factors = tensors(T, 200)
    window, blind, means = Window(sink, recent), torch.zeros(H, dtype=torch.bool), 2 * key[0, :, 0]
    rest = window, factors, blind, 0.3, None, means
    found = far_attention(query, [key], [value], *rest)
    torch.testing.assert_close(found, plain(query, key, value, *rest), rtol=1e-5, atol=1e-5)


def test_without_factors_it_is_causal_attention(tensors):
    query, key, value, _ = tensors(20, 200)
    mask = torch.ones(20, 200, dtype=torch.bool).tril(180)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )
    found = far_attention(query, [key], [value], Window(32, 32))
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_gradients(tensors, monkeypatch):
    monkeypatch.setattr(module, "SCORES", 2 * 200 * B * H * GROUP)
    query, key, value, _ = tensors(5, 130)
    factors = torch.rand(H, D)
    arguments = (query, key, value, factors)
    weight = torch.randn(B, 5, H * GROUP, D)
    window, blind = Window(32, 32), torch.tensor([False, False, True])

    def gradients(function):
        leaves = [part.clone().requires_grad_(True) for part in arguments]
        (function(*leaves) * weight).sum().backward()
        return [leaf.grad for leaf in leaves]

    found = gradients(lambda q, k, v, a: far_attention(q, [k], [v], window, a, blind, 0.3))
    expected = gradients(lambda q, k, v, a: plain(q, k, v, window, a.expand(B, H, D), blind, 0.3))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
