"""Gradients of far K and V against a direct computation, on tiny random models."""

import numpy as np
import pytest
import torch
import transformers
from baselines.sensitivities import sensitivities
from tiny_models import make_sinks_felt

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.offline.attention_hook import hooked_attention
from vllm_leank.offline.fisher import draw_labels, observe_far

WINDOW = Window(sink=32, recent=32)
QUERIES = 24
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}


MIXED = {
    "num_hidden_layers": 4,
    "layer_types": [f"{kind}_attention" for kind in ["sliding", "full", "sliding", "full"]],
    "sliding_window": 40,
}
OPTIONS = {
    "gemma3_text": MIXED | {"query_pre_attn_scalar": 16},
    "gpt_oss": MIXED | {"num_local_experts": 2, "num_experts_per_tok": 1},
}


def tiny(model_type="llama"):
    transformers.set_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SHAPE | OPTIONS.get(model_type, {}))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    make_sinks_felt(model)
    return model


def prompt(tokens, seed=0):
    return torch.randint(97, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


class Shifted:
    """An attention hook, one pass over a whole prompt: the last queries see far K and V shifted."""

    def __init__(self, length, layers, far):
        self.first = length - QUERIES
        self.far = far
        shape = (layers, 2, 1, 2, len(far), 16)
        self.shifts = torch.zeros(shape, requires_grad=True)

    def __call__(self, layer, query, key, value, attention_mask, scaling, sink_scores):
        T = key.shape[2]
        hidden = torch.ones(T, T).triu(1).bool()

        def attend(k, v):
            k, v = (one.repeat_interleave(2, dim=1) for one in (k, v))
            scores = (query @ k.transpose(-1, -2) * scaling).masked_fill(hidden, float("-inf"))
            if sink_scores is not None:
                sinks = sink_scores.view(1, -1, 1, 1).expand(-1, -1, T, -1)
                scores = torch.cat([scores, sinks], dim=-1)
            return scores.softmax(-1)[..., :T] @ v

        places = slice(self.far.start, self.far.stop)
        shifted = []
        for one, shift in zip((key, value), self.shifts[layer], strict=True):
            whole = torch.zeros_like(one)
            whole[:, :, places] = shift
            shifted.append(one + whole)
        plain, moved = attend(key, value), attend(*shifted)
        last = torch.arange(T)[:, None] >= self.first
        return torch.where(last, moved, plain).transpose(1, 2)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma3_text", "gpt_oss"])
def test_sums_of_squared_gradients_are_those_of_a_direct_computation(model_type):
    model = tiny(model_type)
    prompts = [prompt(150), prompt(121, 1), prompt(60, 2)]  # the last has no far tokens
    found = sensitivities(model, prompts, WINDOW, queries=QUERIES, chunk=50, seed=3)
    expected = torch.zeros(2, 2, 2, 16)
    for number, ids in enumerate(prompts[:2]):
        far = range(32, WINDOW.boundary(len(ids) - QUERIES + 1))
        assert len(far) >= 32
        hook = Shifted(len(ids), 2, far)
        with hooked_attention(model, hook):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -QUERIES:]
        for draw in range(2):
            labels = draw_labels(logits.detach(), [3, number], draw)
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, hook.shifts, retain_graph=True)
            expected += gradient[:, :, 0].square().sum(dim=3) / 4
    for side, name in enumerate(("key", "value")):
        np.testing.assert_allclose(getattr(found, name), expected[:, side].numpy(), rtol=2e-3)
    assert found.key.min() > 0


def test_far_tokens_are_shown():
    seen = []
    model = tiny()
    observe_far(
        model,
        [prompt(150)],
        WINDOW,
        lambda layer, first, key, value: seen.append((layer, first, key, value)),
        queries=QUERIES,
    )
    assert [(layer, first) for layer, first, _, _ in seen] == [(0, 32), (1, 32)]
    cache = model(torch.tensor([prompt(150)[:-QUERIES]])).past_key_values
    for layer, _, key, value in seen:
        torch.testing.assert_close(key, cache.layers[layer].keys[:, :, 32:64])
        torch.testing.assert_close(value, cache.layers[layer].values[:, :, 32:64])


def test_prompts_without_far_tokens_are_refused():
    with pytest.raises(UserError, match="no prompt has far tokens"):
        sensitivities(tiny(), [prompt(80)], WINDOW, queries=QUERIES)


def test_labels_are_drawn_from_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20000, 3)
    shares = torch.bincount(draw_labels(logits, [0], 0), minlength=3) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.02, rtol=0)
    assert torch.equal(draw_labels(logits, [0], 1), draw_labels(logits, [0], 1))
    assert not torch.equal(draw_labels(logits, [0], 0), draw_labels(logits, [0], 1))
