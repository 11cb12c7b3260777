"""Head statistics against a plain recomputation, channel choice against LeanK's rule."""

import json
import re

import numpy as np
import pytest
import torch
import transformers

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.select_channels import select_channels
from vllm_leank.offline import calibrate as calibration
from vllm_leank.offline.attention_hook import hooked_attention
from vllm_leank.offline.calibrate import HeadStatistics, energy_mask, head_shares, measure_heads
from vllm_leank.offline.calibration_prompts import calibration_prompts
from vllm_leank.offline.mask_request import MaskRequest
from vllm_leank.offline.prompts import read_samples

THETA = 10000.0
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "head_dim": 16,
    "first_k_dense_replace": 2,
}
WINDOW = Window(sink=32, recent=32)
PROMPTS = [[*range(1, 90), *range(3, 60)], [5, 5, 5, 7, 96, 0], [42]]


def tiny(model_type, **options):
    transformers.set_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SHAPE | options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter)
    return model


def expected_statistics(model, prompts, query_tokens):
    """Energies and far mass from what the projections give, with RoPE and attention written out."""
    H, D = SHAPE["num_key_value_heads"], SHAPE["head_dim"]
    group = SHAPE["num_attention_heads"] // H
    layers = model.model.layers
    sums = torch.zeros(2, len(layers), H, D, dtype=torch.float64)
    mass = torch.zeros(len(layers), H, dtype=torch.float64)
    counts = [0, 0]
    for ids in prompts:
        seen = {}
        handles = []
        for i, layer in enumerate(layers):
            for j, name in enumerate("qk"):
                norm = getattr(layer.self_attn, f"{name}_norm", None)
                source = norm or getattr(layer.self_attn, f"{name}_proj")
                handles.append(
                    source.register_forward_hook(
                        lambda module, args, out, seen=seen, key=(i, j): seen.update({key: out})
                    )
                )
        with torch.no_grad():
            model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        positions = torch.arange(len(ids), dtype=torch.float64)[:, None]
        frequencies = THETA ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
        cos, sin = (positions * frequencies).cos(), (positions * frequencies).sin()
        rotated = {}
        for (i, j), out in seen.items():
            x = out.double().reshape(len(ids), -1, D)
            low, high = x[..., : D // 2], x[..., D // 2 :]
            c, s = cos[:, None], sin[:, None]
            rotated[i, j] = torch.cat([low * c - high * s, high * c + low * s], dim=-1)
        first = max(0, len(ids) - query_tokens) if query_tokens else 0
        for i in range(len(layers)):
            q, k = rotated[i, 0], rotated[i, 1]
            for head in range(H):
                sums[1, i, head] += k[:, head].square().sum(0)
            for head in range(H * group):
                sums[0, i, head // group] += q[first:, head].square().sum(0)
                for t in range(first, len(ids)):
                    weights = (k[: t + 1, head // group] @ q[t, head] / D**0.5).softmax(0)
                    # Dense stay the first 32 tokens and the last 32 to 63.
                    steps = max(0, t + 1 - 64) // 32
                    mass[i, head // group] += weights[32 : 32 + 32 * steps].sum()
        counts[0] += (len(ids) - first) * group
        counts[1] += len(ids)
    return (sums[0] / counts[0] * (sums[1] / counts[1])).numpy(), (mass / counts[0]).numpy()


@pytest.mark.parametrize("query_tokens", [None, 4])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_statistics_are_energy_after_rope_and_attention_on_far_tokens(
    model_type, query_tokens, monkeypatch
):
    monkeypatch.setattr(calibration, "QUERY_CHUNK", 50)
    model = tiny(model_type, **({"sliding_window": None} if model_type == "mistral" else {}))
    heads = measure_heads(model, PROMPTS, WINDOW, query_tokens)
    energy, far_mass = expected_statistics(model, PROMPTS, query_tokens)
    np.testing.assert_allclose(heads.energy, energy, rtol=1e-4)
    np.testing.assert_allclose(heads.far_mass, far_mass, rtol=1e-4)
    assert (far_mass > 0).all()
    assert model.config._attn_implementation == "sdpa"


def test_a_channels_score_is_its_heads_far_mass_times_its_share_of_the_energy():
    energy = np.array([[[1.0, 3.0], [20.0, 20.0], [5.0, 0.0]]])
    heads = HeadStatistics(energy, np.array([[0.4, 0.2, 0.0]]))
    np.testing.assert_allclose(heads.scores(), [[[0.1, 0.3], [0.1, 0.1], [0.0, 0.0]]])


def test_prompts_without_far_tokens_are_refused():
    heads = measure_heads(tiny("llama"), PROMPTS, Window(sink=64, recent=256))
    with pytest.raises(UserError, match="longer prompts"):
        heads.scores()


def test_the_hook_changes_no_output():
    model = tiny("llama")
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = model(ids).logits
        with hooked_attention(model, lambda *args: None):
            hooked = model(ids).logits
            # With a cache and several new tokens, the causal mask must come from the model.
            cache = model(ids[:, :40], use_cache=True).past_key_values
            resumed = model(ids[:, 40:], past_key_values=cache).logits
    assert torch.equal(before, hooked)
    torch.testing.assert_close(resumed, before[:, 40:])


def test_a_hook_can_replace_attention():
    model = tiny("llama")
    ids = torch.tensor([PROMPTS[0]])
    seen = []

    def scaled_down(layer, query, key, value, attention_mask, scaling, sink_scores):
        seen.append((layer, tuple(query.shape), tuple(key.shape), scaling))
        key = key * 0
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2)

    with torch.no_grad():
        dense = model(ids).logits
        with hooked_attention(model, scaled_down):
            changed = model(ids).logits
        assert torch.equal(model(ids).logits, dense)
    assert not torch.allclose(changed, dense)
    assert seen == [
        (i, (1, 6, 146, 32), (1, 2, 146, 32), pytest.approx(32**-0.5)) for i in range(2)
    ]


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("mistral", {"sliding_window": 16}, "no layer of the model has full attention"),
        ("gemma2", {"attn_logit_softcapping": 50.0}, "logits"),
        ("deepseek_v3", LATENT, "latent attention"),
        ("mpt", {"d_model": 48, "n_heads": 6, "n_layers": 2}, "AttentionInterface"),
    ],
)
def test_other_kinds_of_attention_are_refused(model_type, options, message):
    model = tiny(model_type, **options)
    before = model.config._attn_implementation
    with pytest.raises(UserError, match=message):
        measure_heads(model, PROMPTS, WINDOW)
    assert model.config._attn_implementation == before


def test_values_that_are_not_finite_are_refused():
    model = tiny("llama")
    model.model.layers[1].self_attn.q_proj.weight.data[3] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        measure_heads(model, PROMPTS, WINDOW).scores()


def rounded_at_threshold(scores, threshold, align):
    """Stage 2 of LeanK, word for word: survivors of a global threshold, rounded per head."""
    keep = np.zeros(scores.shape, bool)
    for layer, head in np.ndindex(scores.shape[:2]):
        survivors = int((scores[layer, head] >= threshold).sum())
        count = (survivors + align // 2) // align * align
        keep[layer, head, np.argsort(-scores[layer, head])[:count]] = True
    return keep


@pytest.mark.parametrize("align", [16, 32, 64])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 0.93, 1.0])
def test_selection_is_leanks_rule_at_the_threshold_that_meets_the_ratio(align, ratio):
    rng = np.random.default_rng(1)
    scores = np.exp(rng.normal(size=(4, 3, 64)) + 2 * rng.normal(size=(4, 3, 1)))
    keep = select_channels(scores, ratio, align)
    assert keep.sum() == round((1 - ratio) * scores.size / align) * align
    thresholds = [np.inf, *np.sort(scores.reshape(-1))[::-1]]
    candidates = [rounded_at_threshold(scores, threshold, align) for threshold in thresholds]
    assert any((keep == candidate).all() for candidate in candidates)


def test_equal_scores_go_to_the_lower_index():
    keep = select_channels(np.ones((2, 2, 64)), 0.625, 32)
    assert keep.sum(-1).tolist() == [[64, 32], [0, 0]]
    assert keep[0, 1, :32].all()


def write(path, *lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def read(path, max_prompts=10, max_tokens=10):
    tokenize = lambda text: [len(word) for word in text.split()]  # noqa: E731
    limits = {"vocab_size": 97, "max_samples": max_prompts, "max_tokens": max_tokens}
    samples = read_samples(path, tokenize, tokenize, **limits, room=0)
    return [sample.prompt + sample.answer for sample in samples]


def test_prompts(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        '{"prompt_token_ids": [1, 2, 3], "more": [4]}',
        "",
        '{"prompt": "one three", "answer": "fifteen"}',
        "not looked at",
    )
    assert read(path, max_prompts=2) == [[1, 2, 3], [3, 5, 7]]
    assert read(path, max_prompts=2, max_tokens=2) == [[2, 3], [5, 7]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "must be an object"),
        ("{}", "one of"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "one of"),
        ('{"prompt": 3}', "must be text"),
        ('{"prompt": ""}', "empty"),
        ('{"prompt_token_ids": []}', "empty"),
        ('{"prompt_token_ids": 3}', "must be a list"),
        ('{"prompt_token_ids": [1, -1]}', "-1 is no token id"),
        ('{"prompt_token_ids": [97]}', "0..96"),
        ('{"prompt_token_ids": [true]}', "True is no token id"),
        ('{"prompt_token_ids": [1.0]}', "1.0 is no token id"),
    ],
)
def test_bad_prompts_are_refused_with_the_line(tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", '{"prompt": "good"}', line)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_files_without_prompts_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="has no prompts"):
        read(write(tmp_path / "p.jsonl", "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(UserError, match="not UTF-8"):
        read(tmp_path / "latin.jsonl")


def test_calibration_is_deterministic_and_keeps_the_loud_channels_of_a_head(tmp_path):
    """Made loud: in KV head 1 of layer 1, channels 0..7 and 16..23, which RoPE mixes with them."""
    model = tiny("llama")
    attention = model.model.layers[1].self_attn
    loud = torch.cat([torch.arange(8), torch.arange(16, 24)])
    with torch.no_grad():
        attention.k_proj.weight[32 + loud] *= 30
        for query_head in (3, 4, 5):
            attention.q_proj.weight[32 * query_head + loud] *= 30
    model.save_pretrained(tmp_path / "my-model")
    data = write(tmp_path / "p.jsonl", *(json.dumps({"prompt_token_ids": ids}) for ids in PROMPTS))
    window = Window(32, 32)
    request = MaskRequest.open(
        str(tmp_path / "my-model"), None, ratio=0.875, align=16, sink=32, recent=32
    )
    prompts = calibration_prompts(request.checkpoint, data, window, max_tokens=512)
    first, second = (
        energy_mask(request, request.checkpoint.load(device="cpu"), prompts) for _ in range(2)
    )
    assert first.sha256 == second.sha256
    assert first.model == "my-model"
    assert first.kept_counts.tolist() == [[0, 0], [0, 16]]
    assert first.kept_channels(1, 1) == tuple(loud.tolist())


def test_shares_do_not_depend_on_the_size_of_a_heads_logits():
    scores = np.random.default_rng(0).random((2, 2, 32))
    scaled = scores * np.array([[1.0, 1e-6], [1e9, 1.0]])[..., None]
    np.testing.assert_allclose(head_shares(scaled), head_shares(scores))
    np.testing.assert_allclose(head_shares(scores).sum(-1), 1)
    scores[0, 1] = 0
    assert (head_shares(scores)[0, 1] == 0).all()
