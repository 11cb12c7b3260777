"""The oracle against hand-computed cases, plain transformers and a loop over single keys."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from format_samples import mask_for
from oracle import QUERY_CHUNK, Oracle, Rule, boundary, heads_of, masked_attention
from transformers import AutoModelForCausalLM

from vllm_leank.core.formats import ArchiveFormat, known_formats

VOCABULARY = 512


def random_tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def random_keep(layers: int, kv_heads: int, head_dim: int, seed: int = 0) -> np.ndarray:
    """A third of the channels at random; head 0 of layer 0 keeps nothing."""
    keep = np.random.default_rng(seed).random((layers, kv_heads, head_dim)) < 1 / 3
    keep[0, 0] = False
    return keep


@pytest.mark.parametrize(
    ("length", "sink", "recent", "expected"),
    [
        (0, 64, 256, 64),
        (64, 64, 256, 64),
        (320, 64, 256, 64),
        (351, 64, 256, 64),
        (352, 64, 256, 96),
        (383, 64, 256, 96),
        (384, 64, 256, 128),
        (8192, 64, 256, 7936),
        (34, 1, 2, 1),
        (35, 1, 2, 33),
        (66, 1, 2, 33),
        (67, 1, 2, 65),
        (31, 0, 0, 0),
        (32, 0, 0, 32),
        (100, 0, 100, 0),
        (139, 3, 105, 3),
        (140, 3, 105, 35),
    ],
)
def test_boundary_table(length: int, sink: int, recent: int, expected: int) -> None:
    assert boundary(length, sink, recent) == expected


# One query at position 34 with sink 1 and recent 2: keys 0, 33 and 34 are near, 1..32 are far.
# Every key is 0 (weight 1) but the far key 5, which is (ln 2, ln 100); only its V is not 0, or that
# of the near key 33. The head keeps channel 0.
@pytest.mark.parametrize(
    ("keep", "exact_until", "far_value", "near_value", "expected"),
    [
        ([True, False], 0, 1.0, 0.0, 2 / 36),  # weight 2 among 34 of weight 1
        ([True, False], 34, 1.0, 0.0, 2 / 36),  # position 34 is the first that is not exact
        ([True, False], 35, 1.0, 0.0, 200 / 234),  # all channels: weight 2 x 100
        ([True, True], 0, 1.0, 0.0, 200 / 234),
        ([False, True], 0, 1.0, 0.0, 100 / 134),
        ([False, False], 0, 1.0, 0.0, 0.0),  # streaming: far V is dropped
        ([False, False], 0, 0.0, 1.0, 1 / 3),  # and far keys take no weight: 3 keys remain
        ([False, False], 35, 0.0, 1.0, 1 / 234),  # but not while exact
        ([True, False], 0, 0.0, 1.0, 1 / 36),
    ],
)
def test_attention_by_hand(
    keep: list[bool], exact_until: int, far_value: float, near_value: float, expected: float
) -> None:
    key, value = torch.zeros(1, 35, 2), torch.zeros(1, 35, 2)
    key[0, 5] = torch.tensor([math.log(2), math.log(100)])
    value[0, 5], value[0, 33] = far_value, near_value
    rule = Rule(heads_of(np.array([[keep]]), [0]), sink=1, recent=2, exact_until=exact_until)
    output = masked_attention(torch.ones(1, 1, 2), key, value, scaling=1.0, layer=0, rule=rule)
    torch.testing.assert_close(output, torch.full((1, 1, 2), expected))


@pytest.mark.parametrize("archive_format", known_formats(), ids=lambda one: one.name)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 96])
def test_without_far_tokens_every_format_is_the_plain_model(
    tiny_llama_dir: Path, archive_format: ArchiveFormat, length: int
) -> None:
    """Also where no token lies behind the sink, so that there is nothing to round."""
    mask = mask_for(archive_format, tiny_llama_dir, [16, 0, 48])
    oracle = Oracle(tiny_llama_dir, mask, sink=32, recent=64, archive_format=archive_format)
    plain = Oracle(tiny_llama_dir, np.ones((2, 2, 64), bool), sink=32, recent=64)
    tokens = random_tokens(length)
    torch.testing.assert_close(oracle.logits(tokens, 0), plain.logits(tokens, 0))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("exact_until", [0, 100])
def test_full_mask_is_the_plain_model(
    tiny_llama: Callable[..., Path], head_dim: int, exact_until: int
) -> None:
    directory = tiny_llama(head_dim=head_dim)
    tokens = random_tokens(QUERY_CHUNK + 50)
    plain = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.inference_mode():
        expected = plain(torch.tensor([tokens])).logits[0]
    oracle = Oracle(directory, np.ones((2, 2, head_dim), dtype=bool), sink=8, recent=16)
    torch.testing.assert_close(oracle.logits(tokens, exact_until), expected, rtol=1e-4, atol=1e-4)


def test_layers_key_by_key(tiny_llama_dir: Path) -> None:
    """The attention again, one query and one key at a time, from the layers' own projections."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    sink, recent, exact_until = 3, 10, 60
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64).eval()
    keep = random_keep(2, 2, 64)
    tokens = random_tokens(90)
    oracle = Oracle(model, keep, sink, recent, dtype=torch.float64)

    def attention(index: int, hidden: torch.Tensor) -> torch.Tensor:
        layer = model.model.layers[index].self_attn
        q, k, v = (
            projection(hidden).view(90, -1, 64).transpose(0, 1)
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        cos, sin = model.model.rotary_emb(hidden, torch.arange(90).unsqueeze(0))
        q, k = (x[0] for x in apply_rotary_pos_emb(q.unsqueeze(0), k.unsqueeze(0), cos, sin))
        rows = []
        for t in range(90):
            steps = max(0, t + 1 - recent - sink) // 32
            far = range(sink, sink + 32 * steps) if t >= exact_until else range(0)
            heads = []
            for head in range(4):
                channels = torch.from_numpy(keep[index, head // 2])
                weight, total = torch.zeros(64, dtype=torch.float64), 0.0
                for j in range(t + 1):
                    if j in far and not channels.any():
                        continue
                    chosen = channels if j in far else torch.ones(64, dtype=torch.bool)
                    score = (q[head, t][chosen] * k[head // 2, j][chosen]).sum() / math.sqrt(64)
                    weight += score.exp() * v[head // 2, j]
                    total += score.exp()
                heads.append(weight / total)
            rows.append(torch.cat(heads))
        return layer.o_proj(torch.stack(rows))

    with torch.inference_mode():
        x = model.model.embed_tokens(torch.tensor(tokens))
        for index, block in enumerate(model.model.layers):
            x = x + attention(index, block.input_layernorm(x))
            x = x + block.mlp(block.post_attention_layernorm(x))
        expected = model.lm_head(model.model.norm(x))
    # float32 parts of transformers' own norms and rotary embedding bound the agreement.
    torch.testing.assert_close(
        oracle.logits(tokens, exact_until), expected.float(), rtol=1e-4, atol=1e-4
    )


def test_pruning_starts_where_it_should(tiny_llama_dir: Path) -> None:
    """Logits part from the dense model at the first query that has far keys, not before."""
    sink, recent, exact_until = 8, 16, 80
    tokens = random_tokens(160)
    pruned = Oracle(tiny_llama_dir, random_keep(2, 2, 64), sink, recent)
    dense = Oracle(tiny_llama_dir, np.ones((2, 2, 64), dtype=bool), sink, recent)
    expected = dense.logits(tokens, 0)

    def differs(exact_until: int) -> list[bool]:
        gap = (pruned.logits(tokens, exact_until) - expected).abs().amax(dim=1)
        return (gap > 0.05).tolist()

    assert differs(exact_until) == [False] * 80 + [True] * 80
    assert differs(0) == [False] * 55 + [True] * 105  # boundary(56) is the first above sink


def test_streaming_head_ignores_far_tokens(tiny_llama: Callable[..., Path]) -> None:
    """With one layer of streaming heads, other far tokens give the same logits."""
    oracle = Oracle(tiny_llama(layers=1), np.zeros((1, 2, 64), dtype=bool), sink=8, recent=16)
    tokens = random_tokens(120)
    other = tokens[:8] + random_tokens(96 - 8 - 8, seed=1) + tokens[88:]
    assert boundary(106, 8, 16) == 72
    assert boundary(120, 8, 16) == 104
    torch.testing.assert_close(oracle.logits(tokens, 0)[119], oracle.logits(other, 0)[119])
    exact = oracle.logits(tokens, 120)[119] - oracle.logits(other, 120)[119]
    assert exact.abs().max() > 0.05


def test_greedy_agrees_with_one_forward(tiny_llama_dir: Path) -> None:
    oracle = Oracle(tiny_llama_dir, random_keep(2, 2, 64), sink=8, recent=16)
    prompt = random_tokens(90)
    tokens, logits = oracle.greedy(prompt, 40)
    whole = oracle.logits(prompt + tokens, exact_until=90)[89:-1]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    assert tokens == logits.argmax(dim=1).tolist()


def test_position_logprobs(tiny_llama_dir: Path) -> None:
    oracle = Oracle(tiny_llama_dir, random_keep(2, 2, 64), sink=8, recent=16)
    tokens = random_tokens(70)
    logprobs = oracle.position_logprobs(tokens, exact_until=64)
    assert logprobs.shape == (69,)
    rows = oracle.logits(tokens, exact_until=64).softmax(dim=1)
    assert logprobs[40].exp().item() == pytest.approx(rows[40, tokens[41]].item(), rel=1e-4)


def test_loaded_model_keeps_its_attention(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    before = model.config._attn_implementation
    oracle = Oracle(model, random_keep(2, 2, 64), sink=8, recent=16)
    oracle.logits(random_tokens(80), 0)
    assert model.config._attn_implementation == before


def test_wrong_shape_and_no_dense_token_are_refused(tiny_llama_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"\(2, 2, 32\), the model needs \(2, 2, 64\)"):
        Oracle(tiny_llama_dir, np.ones((2, 2, 32), dtype=bool), sink=8, recent=16)
    with pytest.raises(ValueError, match="dense token"):
        Oracle(tiny_llama_dir, np.ones((2, 2, 64), dtype=bool), sink=0, recent=0)
