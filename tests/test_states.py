"""Layers that keep states: what a plan makes of them, and that vLLM counts the same."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from archive_definition import PACKED, plan_of
from mask_samples import full_mask, geometry_of
from mixed_models import save_mixed
from state_models import KINDS, MODELS, STATE, save_state
from test_engine_answers import long_but, prompts_of
from test_refusals import config_of as any_config_of
from tiny_models import skip_without_torchvision
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_leank.core.capacity import dense_capacity, leank_capacity
from vllm_leank.core.formats import NATIVE
from vllm_leank.core.geometry import Geometry
from vllm_leank.core.layers import state_layers
from vllm_leank.core.page_sizes import filled, plan_cache
from vllm_leank.core.plan import CachePlan
from vllm_leank.core.profile import Profile
from vllm_leank.core.states import StateLayers
from vllm_leank.core.window import Window
from vllm_leank.mask.file import save_mask
from vllm_leank.offline.attention_hook import hooked_attention
from vllm_leank.offline.context import Context, logits, read_prompt
from vllm_leank.offline.fisher import far_gradients
from vllm_leank.serving.impl import check_all_layers
from vllm_leank.serving.report import describe
from vllm_leank.serving.serve_line import examine
from vllm_leank.serving.settings import load_settings


class Shape(NamedTuple):
    """Served layers, their KV heads and channels; layers with states, and bytes of one."""

    layers: int
    heads: int
    head_dim: int
    states: int
    state_bytes: int

    def plan(self, tp_size: int = 1) -> CachePlan:
        """With 2 bits in bf16."""
        head = Profile(k2=self.head_dim, v2=self.head_dim)
        heads = ((head,) * self.heads,) * self.layers
        states = StateLayers(self.states, self.state_bytes)
        return plan_cache(heads, self.head_dim, 2, tp_size, PACKED, states=states)


PARTS = long_but(MODELS, "granitemoehybrid", "qwen3_next")
"""Types of models whose prompts are read in parts."""


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    return save_state("granitemoehybrid", tmp_path_factory.mktemp("granite"))


def config_of(model, options, **args):
    return any_config_of(model, options, **({"enable_prefix_caching": False} | args))


def options_of(model):
    path = model / "mask.yaml"
    save_mask(full_mask(model), path, overwrite=True)
    return {"mask": str(path)}


@pytest.mark.parametrize("model_type", MODELS)
def test_states_are_as_large_as_vllms(model_type, tmp_path, monkeypatch):
    # On CPUs that know bf16 in AVX-512 vLLM has some states in fp32, whatever is asked for.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    skip_without_torchvision(model_type)
    model = save_state(model_type, tmp_path)
    config, options = AutoConfig.from_pretrained(model), options_of(model)
    count = len(KINDS) if model_type == "falcon_h1" else KINDS.count(STATE)
    for tp_size in (1, 2, 4):
        args = {"tensor_parallel_size": tp_size, "distributed_executor_backend": "mp"}
        found = load_settings(config_of(model, options, dtype="float32", **args)).plan.states
        assert found == state_layers(config, 4, tp_size)
        assert found.count == count
    wider = config_of(model, options, dtype="bfloat16", mamba_ssm_cache_dtype="float32")
    narrow = config_of(model, options, dtype="bfloat16")
    sizes = [load_settings(one).plan.states.state_bytes for one in (wider, narrow)]
    assert sizes[1] == state_layers(config, 2, 1).state_bytes
    # LFM2 has convolutions alone, and two configs ask for the wider ones themselves.
    same = ("lfm2", "lfm2_moe", "qwen3_5_text", "nemotron_h")
    assert (sizes[1] < sizes[0]) == (model_type not in same)


def test_the_log_says_whose_the_layers_are(granite):
    line, *_ = describe(load_settings(config_of(granite, options_of(granite), dtype="float32")))
    assert line == (
        "leank layers: serves 2 of 6 layers, those with full attention; the states of 4 layers "
        "stay vLLM's, 19,840 bytes of each layer and request"
    )


def test_capacity_counts_states():
    window, pool = Window(64, 256), 1 << 30
    alone = plan_of([[128, 128]] * 4, 128, 2)
    small = plan_of([[128, 128]] * 4, 128, 2, states=StateLayers(20, 65_000))
    large = plan_of([[128, 128]] * 4, 128, 2, states=StateLayers(20, 2_000_000))
    token = 4 * 2 * 2 * 128 * 2
    for plan, kept in ((alone, 0), (small, 20 * 65_000), (large, 20 * 2_000_000)):
        found = dense_capacity(plan, pool, 32768).in_decode
        assert found == pytest.approx(pool / (32768 * token + kept))
    # A block holds the window pages of four layers, so two states.
    assert small.block_bytes == alone.block_bytes == 32 * token
    held = [plan.blocks_in_decode(window, 32768) for plan in (alone, small, large)]
    assert held[1] - held[0] == 10
    # A large state is a block, and the pages of both groups grow with it.
    assert large.block_bytes == max(2_000_000, large.archive_page_bytes)
    assert large.archive_block > alone.archive_block
    assert alone.window_block == small.window_block == 32
    assert large.window_block == 15 * 32
    assert held[2] == large.blocks_held(window, 32768, 0) + 20
    short = replace(large, window_block=32)
    fit = [leank_capacity(one, window, pool, 32768) for one in (short, large)]
    assert fit[1].in_prefill > 2 * fit[0].in_prefill
    assert fit[1].in_decode > fit[0].in_decode


SHAPES = {
    "Qwen3-Next 80B": (Shape(12, 2, 256, 36, 1_097_728), 128, 1024),
    "Qwen 3.5 9B": (Shape(8, 4, 256, 24, 2_146_304), 64, 512),
    "Qwen 3.5 27B": (Shape(16, 4, 256, 48, 3_207_168), 96, 768),
    "Granite 4 H Small": (Shape(4, 8, 128, 36, 2_147_840), 128, 1024),
    "Falcon-H1 34B": (Shape(72, 4, 128, 72, 2_127_872), 32, 256),
    "Nemotron 3 Nano": (Shape(6, 2, 128, 23, 2_134_016), 352, 2432),
    "LFM2 2.6B": (Shape(8, 8, 64, 22, 8_192), 32, 256),
}
"""Of real models, and tokens of their window and archive pages at 2 bits."""

ARCHITECTURE = Path(__file__).parents[1] / "docs/architecture.md"


@pytest.mark.parametrize("name", SHAPES)
def test_pages_of_both_groups_fill_a_block_beside_states(name):
    shape, window_block, archive_block = SHAPES[name]
    plan, window = shape.plan(), Window(64, 256)
    assert (plan.window_block, plan.archive_block) == (window_block, archive_block)
    token = shape.layers * shape.heads * 2 * shape.head_dim * 2
    assert window_block * token >= 0.93 * plan.block_bytes
    for length in (1024, 8192, 32768, 131072):
        prompt = plan.blocks_in_prefill(window, length) * plan.block_bytes
        archive = plan.archive_token_bytes * length
        states = shape.states * shape.state_bytes
        # A block of each kind may be begun, and states fill all but an eighth of theirs.
        assert prompt < 1.1 * (length * token + archive) + 1.2 * states + 4 * plan.block_bytes


def test_pages_of_whole_channels_fill_a_block_beside_states_too():
    """With 70% of K pruned, where 256 tokens would leave half of it empty."""
    shape = SHAPES["Nemotron 3 Nano"][0]
    heads = ((Profile(k16=32, v16=128), Profile(k16=48, v16=128)),) * shape.layers
    states = StateLayers(shape.states, shape.state_bytes)
    plan = plan_cache(heads, shape.head_dim, 2, archive_format=NATIVE, states=states)
    assert plan.archive_block > 256
    assert plan.archive_page_bytes > 0.95 * plan.block_bytes
    alone = plan_cache(heads, shape.head_dim, 2, archive_format=NATIVE)
    assert alone.archive_block <= NATIVE.blocks[-1]


def on_paper(shape: Shape) -> str:
    """A shape's figures in the table of docs/architecture.md."""
    window, pool, length = Window(64, 256), 1 << 40, 32768
    plan = shape.plan()
    short = filled(replace(plan, window_block=32), PACKED.blocks + PACKED.longer_blocks)
    dense = dense_capacity(plan, pool, length)

    def lost(one: CachePlan, tokens: int) -> float:
        far = window.boundary(tokens) - window.sink
        filled = far * one.archive_token_bytes + (tokens - far) * one.dense_token_bytes
        filled += shape.states * shape.state_bytes
        return 1 - filled / (one.blocks_in_decode(window, tokens) * one.block_bytes)

    def fit(one: CachePlan) -> tuple[float, float]:
        found = leank_capacity(one, window, pool, length)
        return dense.in_prefill / found.in_prefill, found.in_decode / dense.in_decode

    tokens = 32 * plan.dense_token_bytes
    cells = [
        f"{shape.state_bytes / 1e6:.2f} / {tokens / 1e6:.2f} MB",
        f"{plan.window_block}",
        *(f"{lost(plan, n):.1%} ({lost(short, n):.1%})" for n in (8192, 32768, 131072)),
        *(f"{new:.1f}x ({old:.1f}x)" for new, old in zip(fit(plan), fit(short), strict=True)),
    ]
    return " | ".join(cells)


def test_the_documented_table():
    rows = re.findall(r"^\| (.*) \(\d+ of \d+.*?\) \| (.*) \|$", ARCHITECTURE.read_text(), re.M)
    assert len(rows) == 5
    for name, cells in rows:
        assert cells == on_paper(SHAPES[name][0])


def test_granite_without_positions_has_no_rope(granite, tmp_path):
    assert geometry_of(granite).rope_theta is None
    config = json.loads((granite / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"position_embedding_type": "rope"}))
    assert geometry_of(tmp_path).rope_theta == 10000


STATES = {
    "prefix caching": ({}, {"enable_prefix_caching": True}, "add --no-enable-prefix-caching"),
    "pruned prompts": ({"prefill": "pruned"}, {}, 'the option prefill "pruned" is for models'),
    "pipeline": ({}, {"pipeline_parallel_size": 2}, "remove --pipeline-parallel-size"),
    "speculation": (
        {},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "speculative decoding is for models without layers that keep states: remove",
    ),
}


@pytest.mark.parametrize(("options", "flags", "message"), STATES.values(), ids=STATES)
def test_what_does_not_go_with_states(granite, options, flags, message):
    with pytest.raises(ValueError, match=f"(?s)leank cannot serve this.*{message}"):
        config_of(granite, options_of(granite) | options, **flags)


def test_doctor_names_the_flag(granite):
    given = ["--additional-config", json.dumps({"leank": options_of(granite)})]
    line = [str(granite), "--attention-backend", "leank", "--skip-tokenizer-init", *given]
    (reason,) = examine(line).reasons  # vLLM's default
    assert "add --no-enable-prefix-caching" in reason
    assert examine([*line, "--no-enable-prefix-caching"]).reasons == ()


@pytest.fixture(params=PARTS)
def loaded(request, tmp_path):
    folder = save_state(request.param, tmp_path)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def context_of(model):
    return Context(Geometry.from_hf_config(model.config))


@pytest.fixture
def ids():
    (prompt,) = prompts_of([200])
    return prompt


def test_prompts_are_read_in_parts(loaded, ids):
    """What comes behind a part is what comes behind the whole, however often it is asked, and after
    going back.
    """
    with torch.no_grad():
        expected = loaded(torch.tensor([ids]), use_cache=False).logits[0]
    context = context_of(loaded)

    def follow(first, last):
        with torch.no_grad(), hooked_attention(loaded, context, context=context):
            found = logits(loaded, context, ids[first:last])
        # Sums in another order make up to 6e-4, states that are lost 6 and more.
        torch.testing.assert_close(found, expected[first:last], atol=2e-3, rtol=0)

    read_prompt(loaded, context, ids[:140], 60)
    for _ in range(2):
        follow(140, 200)
    mark = context.mark()
    for at in (140, 141):
        follow(at, at + 1)
        context.advance(1)
    follow(142, 200)
    context.cut(mark)
    follow(140, 200)
    read_prompt(loaded, context, ids[:2], 1)
    follow(2, 40)


def test_what_channels_cost_is_found_through_states(loaded, ids):
    """Gradients of the last tokens are those of one forward and backward pass."""
    window, queries = Window(32, 32), 40
    (one,) = far_gradients(loaded, [ids], window, queries=queries, chunk=1000, draws=1)
    found = [[total.clone() for total in sums] for sums in one.sums.values()]
    (parts,) = far_gradients(loaded, [ids], window, queries=queries, chunk=48, draws=1)
    for some, others in zip(found, parts.sums.values(), strict=True):
        assert all(total.max() > 0 for total in some)
        torch.testing.assert_close(some, others, rtol=1e-2, atol=1e-6)


def test_layers_that_keep_states_are_what_the_config_says(granite, tmp_path):
    geometry = geometry_of(save_mixed("gemma3_text", tmp_path))
    check_all_layers({}, geometry)
    with pytest.raises(ValueError, match="0 layers keep states, but the model's config says 4"):
        check_all_layers({}, geometry, StateLayers(4, 64))
