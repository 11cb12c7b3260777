"""One shared pass over the context against the plain two-pass form, on tiny random models."""

import itertools

import pytest
import torch
import transformers
from tiny_models import make_sinks_felt
from two_pass import two_pass_loss

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.learn.distillation import Distiller
from vllm_leank.offline.prompts import Sample

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
MIXED = {
    "num_hidden_layers": 5,
    "layer_types": [f"{kind}_attention" for kind in ["sliding", "full", "sliding", "full", "full"]],
    "sliding_window": 40,
}
OPTIONS = {
    "mistral": {"sliding_window": None},
    "gemma3_text": MIXED,
    "cohere2": MIXED,
    "gpt_oss": MIXED | {"num_local_experts": 2, "num_experts_per_tok": 1},
}
WINDOW = Window(sink=32, recent=32)


def tiny(model_type, **options):
    transformers.set_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SHAPE | options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    make_sinks_felt(model)
    return model


def sample_of(prompt, answer, seed=0):
    ids = torch.randint(97, (prompt + answer,), generator=torch.Generator().manual_seed(seed))
    return Sample(ids[:prompt].tolist(), ids[prompt:].tolist())


@pytest.mark.parametrize(
    ("model_type", "chunk"),
    [
        ("qwen3", 512),
        ("qwen3", 61),
        ("gemma3_text", 61),
        ("gpt_oss", 61),
        *(
            pytest.param(*one, marks=pytest.mark.long)
            for one in itertools.product(["llama", "qwen2", "mistral"], [512, 61])
        ),
        pytest.param("cohere2", 61, marks=pytest.mark.long),
    ],
)
def test_gradients_are_those_of_two_passes(model_type, chunk):
    model = tiny(model_type, **OPTIONS.get(model_type, {}))
    before = model.config._attn_implementation
    distiller = Distiller(model, WINDOW, chunk)
    blind = torch.zeros(3, 2, dtype=torch.bool)
    blind[1, 0] = True
    # The second sample is read into buffers that held a longer one.
    for sample, heads in itertools.product(
        (sample_of(200, 40), sample_of(130, 5, 1)), (None, blind)
    ):
        factors = torch.rand(3, 2, 32, generator=torch.Generator().manual_seed(1))
        found = factors.clone().requires_grad_(True)
        loss = distiller.loss(sample, found, heads)
        loss.backward()
        expected = factors.clone().requires_grad_(True)
        plain = two_pass_loss(model, WINDOW, sample, expected, heads)
        plain.backward()
        assert loss.item() == pytest.approx(plain.item(), rel=1e-3)
        assert plain.item() > 1e-4
        error = (found.grad - expected.grad).norm() / expected.grad.norm()
        assert error < 1e-3
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == before


def test_factors_of_one_cost_nothing():
    factors = torch.ones(3, 2, 32, requires_grad=True)
    assert Distiller(tiny("llama"), WINDOW).loss(sample_of(200, 9), factors).item() == 0


def test_bf16_weights_give_about_the_same_gradients():
    sample = sample_of(200, 9)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        factors = torch.full((3, 2, 32), 0.5, requires_grad=True)
        Distiller(tiny("llama").to(dtype), WINDOW).loss(sample, factors).backward()
        assert factors.grad.dtype == torch.float32
        gradients.append(factors.grad.flatten())
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.9


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("mistral", {"sliding_window": 16}, "no layer of the model has full attention"),
        ("gemma2", {"attn_logit_softcapping": 50.0}, "logits"),
        ("mpt", {"d_model": 48, "n_heads": 6, "n_layers": 2}, "AttentionInterface"),
        ("bamba", {"mamba_n_heads": 6, "mamba_d_head": 16, "attn_layer_indices": [1]}, "layers"),
    ],
)
def test_other_kinds_of_attention_are_refused(model_type, options, message):
    model = tiny(model_type, **options)
    before = model.config._attn_implementation
    with pytest.raises(UserError, match=message):
        Distiller(model, WINDOW).loss(sample_of(100, 5), torch.ones(3, 2, 32))
    assert model.config._attn_implementation == before
