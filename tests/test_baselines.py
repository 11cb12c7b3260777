"""Other choices of channels, and what simulated pruning does with them."""

from functools import partial

import numpy as np
import pytest
import torch
from baselines.global_energy import global_energy
from baselines.random_channels import random_channels
from baselines.slow_heads import slow_heads
from baselines.think import PrunedByThinK, ThinK
from baselines.uniform_energy import uniform_energy
from transformers import AutoModelForCausalLM, DynamicCache

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.offline.attention_hook import hooked_attention
from vllm_leank.offline.context import Context, logits_after, read_prompt
from vllm_leank.offline.simulate import SimulatedPruning

WINDOW = Window(32, 32)


def test_channels_are_chosen_as_each_rule_says():
    energy = np.ones((1, 4, 64))
    energy[0, 0, :32] = 9
    energy[0, 1, 10:20] = 5
    energy[0, 2, 40:] = 7
    energy[0, 3, 40:48] = 20
    uniform = uniform_energy(energy, 0.85)
    assert uniform.sum(-1).tolist() == [[10, 10, 10, 10]]
    assert np.flatnonzero(uniform[0, 1]).tolist() == [*range(10, 20)]
    together = global_energy(energy, 0.75, 16)
    assert together.sum(-1).tolist() == [[32, 0, 16, 16]]
    # Channels 0..15 and 32..47 are fast; they have 50, 54, 38 and 85% of the energy.
    heads = slow_heads(energy, Geometry(1, 4, 64, 1e4, None), 0.5)
    assert heads.all(-1).tolist() == [[True, False, True, False]]
    assert heads.any(-1).sum() == 2
    first, second, other = (random_channels((2, 4, 64), 0.75, 16, seed) for seed in (0, 0, 1))
    assert (first == second).all()
    assert (first != other).any()
    assert first.mean() == 0.25


@pytest.fixture
def model(tiny_llama_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir)


def hidden(model, prompts, answers, keep, think=None):
    """Logits of the answers after prompts that were read with full attention."""
    hook = SimulatedPruning(WINDOW)
    cache = DynamicCache()
    with torch.no_grad():
        with hooked_attention(model, think or hook):
            model(prompts, past_key_values=cache)
        hook.keep = keep() if callable(keep) else keep
        with hooked_attention(model, hook):
            return model(answers, past_key_values=cache).logits


def test_simulated_pruning_touches_far_keys_only(model):
    ids = torch.randint(512, (2, 120), generator=torch.Generator().manual_seed(0))
    dense = model(ids).logits[:, 110:]
    full = torch.ones(2, 2, 64, dtype=torch.bool)
    torch.testing.assert_close(hidden(model, ids[:, :110], ids[:, 110:], None), dense)
    torch.testing.assert_close(hidden(model, ids[:, :110], ids[:, 110:], full), dense)
    none = hidden(model, ids[:, :110], ids[:, 110:], ~full)
    assert (none - dense).abs().max() > 0.1
    # Below 96 tokens nothing is far.
    short = hidden(model, ids[:, :80], ids[:, 80:95], ~full)
    torch.testing.assert_close(short, model(ids[:, :95]).logits[:, 80:])


def test_think_chooses_for_each_prompt(model):
    ids = torch.randint(512, (2, 120), generator=torch.Generator().manual_seed(0))
    think = ThinK()
    seen = {}
    with (
        torch.no_grad(),
        hooked_attention(
            model,
            lambda layer, q, k, *rest: seen.update({layer: (q, k)}) or think(layer, q, k, *rest),
        ),
    ):
        model(ids)
    keep = think.keep(0.75)
    assert keep.shape == (2, 2, 2, 64)
    assert (keep.sum(-1) == 16).all()
    q, k = seen[1]
    energy = q[1, 2:4, -32:].square().mean((0, 1)) * k[1, 1].square().mean(0)
    assert set(torch.nonzero(keep[1, 1, 1]).flatten().tolist()) == set(
        energy.topk(16).indices.tolist()
    )
    # Rows of a batch have channels of their own.
    together = hidden(model, ids[:, :110], ids[:, 110:], lambda: think.keep(0.5), think)
    for row in (0, 1):
        alone = ThinK()
        part = ids[row : row + 1]
        expected = hidden(model, part[:, :110], part[:, 110:], lambda: alone.keep(0.5), alone)  # noqa: B023
        torch.testing.assert_close(together[row], expected[0], rtol=1e-4, atol=1e-4)


def test_think_chooses_once_a_prompt_is_read(model):
    """What it chooses, and what answers then are, is as where it watches the prompt itself."""
    first, second = torch.randint(512, (2, 120), generator=torch.Generator().manual_seed(1))
    context = Context(Geometry.from_hf_config(model.config))
    hook = PrunedByThinK(WINDOW, 0.5)
    chosen = []
    for ids in (first, second):
        prompt, answer = ids[:110].tolist(), ids[110:].tolist()
        read_prompt(model, context, prompt, 64)
        hook.begin(model, context, prompt)
        chosen.append(hook.keep)
        assert context.length == len(prompt)
        found = logits_after(model, context, answer, hook)
        think = ThinK()
        keep = partial(think.keep, 0.5)
        expected = hidden(model, ids[None, :110], ids[None, 110:], keep, think)[0]
        assert torch.equal(hook.keep, think.keep(0.5))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(*chosen)
