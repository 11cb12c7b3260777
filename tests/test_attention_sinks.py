"""Models with attention sinks in transformers: what is measured and learned of them is theirs."""

import numpy as np
import pytest
import torch
from mask_samples import full_mask, random_mask
from mixed_models import save_mixed
from oracle import Oracle
from transformers import AutoModelForCausalLM

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.offline.attention_hook import hooked_attention
from vllm_leank.offline.calibrate import measure_heads
from vllm_leank.offline.context import Context, logits, logits_after, read_prompt
from vllm_leank.offline.prompts import Sample
from vllm_leank.offline.simulate import SimulatedArchive, SimulatedPruning
from vllm_leank.offline.verify.reader import Reader
from vllm_leank.offline.verify.texts import compare_sample

WINDOW = Window(32, 64)
IDS = torch.randint(512, (200,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPT = 170


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_mixed("gpt_oss", tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.fixture(scope="module")
def expected(model):
    """What the model's own attention gives: logits, and weights of each layer's tokens."""
    with torch.no_grad():
        return model(torch.tensor([IDS]), output_attentions=True)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_hook_changes_no_output(model, expected):
    ids = torch.tensor([IDS])
    with torch.no_grad(), hooked_attention(model, lambda *args: None):
        close(model(ids).logits, expected.logits)
        cache = model(ids[:, :PROMPT], use_cache=True).past_key_values
        close(model(ids[:, PROMPT:], past_key_values=cache).logits, expected.logits[:, PROMPT:])


def test_answers_behind_a_prompt_that_was_read_in_chunks(model, expected):
    context, pruning = Context(Geometry.from_hf_config(model.config)), SimulatedPruning(WINDOW)
    read_prompt(model, context, IDS[:PROMPT], 61)
    pruning.keep = torch.ones(context.geometry.shape, dtype=torch.bool)
    with torch.no_grad():
        with hooked_attention(model, context, context=context):
            close(logits(model, context, IDS[PROMPT:]), expected.logits[0, PROMPT:])
        for hook in (SimulatedArchive(WINDOW), SimulatedArchive(WINDOW, as_it_is), pruning):
            found = logits_after(model, context, IDS[PROMPT:], hook)
            close(found, expected.logits[0, PROMPT:])


def as_it_is(layer, first, key, value):
    return key, value


def test_calibration_takes_the_weights_of_far_tokens_for_what_they_are(model, expected):
    at = torch.arange(len(IDS))
    far = (at >= 32) & (at < WINDOW.boundary(at[:, None] + 1))
    found = measure_heads(model, [IDS], WINDOW).far_mass
    for number, layer in enumerate((1, 3)):
        weights = expected.attentions[layer][0] * far  # [num_heads, T, S]
        np.testing.assert_allclose(
            found[number], weights.sum(-1).unflatten(0, (2, -1)).mean((1, 2)), rtol=1e-4
        )


def test_the_oracle_knows_sinks(folder, expected):
    oracle = Oracle(folder, full_mask(folder), 32, 64)
    close(oracle.logits(IDS, 0), expected.logits[0])


def test_verify_sees_what_the_oracle_sees(folder, model):
    mask, answer = random_mask(folder, [32, 0, 16, 64]), IDS[PROMPT:]
    reader = Reader(model, mask, WINDOW, chunk=61)
    found = compare_sample(reader, ("here", Sample(IDS[:PROMPT], answer)), 0, 32).found
    p, q = (
        Oracle(folder, one, 32, 64).logits(IDS, PROMPT)[PROMPT:].log_softmax(-1)
        for one in (full_mask(folder), mask)
    )
    expected = (p.exp() * (p - q)).sum(-1)
    assert expected.sum() > 0.01
    np.testing.assert_allclose(found.kl, expected, rtol=2e-2, atol=1e-5)
