"""Block tables of sliding layers, and what these layers add to a plan."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from archive_definition import plan_of
from leank_configs import config_of
from mask_samples import full_mask
from mixed_models import save_mixed
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends import flash_attn
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from vllm_leank.core.capacity import dense_capacity, leank_capacity
from vllm_leank.core.layers import SlidingLayers, layer_kinds, sliding_layers
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.file import save_mask
from vllm_leank.serving.metadata import PagesMetadataBuilder
from vllm_leank.serving.settings import load_settings
from vllm_leank.serving.sliding import hide_left_pages, sliding_backend


@pytest.mark.parametrize("window", [1, 2, 32, 33, 48, 1000])
def test_pages_before_the_first_query_that_is_computed_are_hidden(window):
    lengths = [(0, 1), (31, 1), (32, 1), (33, 1), (64, 1), (95, 30), (200, 7), (256, 1), (0, 300)]
    computed, new = (torch.tensor(one, dtype=torch.int32) for one in zip(*lengths, strict=True))
    table = torch.arange(1, 1 + len(lengths) * 12, dtype=torch.int32).view(-1, 12)
    given = table.clone()
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), new.cumsum(0, dtype=torch.int32)])
    step = SimpleNamespace(
        block_table_tensor=table, query_start_loc=starts, seq_lens=computed + new
    )
    hide_left_pages(step, window)
    for row, (first, _) in enumerate(lengths):
        seen = [page for page in range(12) if (page + 1) * 32 > first - window + 1]
        assert table[row, seen].equal(given[row, seen])
        assert (table[row, : seen[0]] == given[row, seen[0]]).all()


def test_steps_that_tell_no_lengths(tiny_llama_dir, mask_file, tmp_path):
    """Beside sliding layers those of dummy runs archive nothing. Without them they may be a draft
    model's, which reads its window alone.
    """
    mixed = save_mixed("gemma3_text", tmp_path / "mixed")
    save_mask(full_mask(mixed), mixed / "mask.yaml")
    step = {"num_reqs": 2, "seq_lens": torch.tensor([300, 4096]), "is_prefilling": None}
    options = {"mask": str(mask_file), "sink": 32, "recent": 64}
    plain = config_of(tiny_llama_dir, options, max_model_len=4096)
    builder = PagesMetadataBuilder(None, [], plain, torch.device("cpu"))
    untold = builder.build(0, SimpleNamespace(rswa_prefix_lens=None, **step))
    assert untold.exact_until.tolist() == [0, 0]
    options["mask"] = str(mixed / "mask.yaml")
    config = config_of(mixed, options, max_model_len=4096)
    window, lengths = load_settings(config).window, torch.tensor([300, 4096], dtype=torch.int32)
    builder = PagesMetadataBuilder(None, [], config, torch.device("cpu"))
    step = {"num_reqs": 2, "seq_lens": lengths, "is_prefilling": None}
    real = builder.build(0, SimpleNamespace(rswa_prefix_lens=torch.tensor([0, 0]), **step))
    for length in lengths.tolist():
        assert window.compaction(0, length, 0)
    assert real.exact_until.tolist() == [0, 0]
    dummy = builder.build(0, SimpleNamespace(rswa_prefix_lens=None, **step))
    for length, exact_until in zip(lengths.tolist(), dummy.exact_until.tolist(), strict=True):
        assert not window.compaction(0, length, exact_until)


def test_builders_share_a_step_and_it_goes_when_it_is_over(tiny_llama_dir, mask_file):
    config = config_of(tiny_llama_dir, {"mask": str(mask_file), "sink": 32, "recent": 64})
    builders = [PagesMetadataBuilder(None, [], config, torch.device("cpu")) for _ in range(2)]
    step = SimpleNamespace(
        num_reqs=1, seq_lens=torch.tensor([300]), is_prefilling=None, rswa_prefix_lens=None
    )
    first, second = (builder.build(0, step) for builder in builders)
    assert first is second
    seen = weakref.ref(first)
    gc.disable()
    try:
        del first, second, step
        assert seen() is None
    finally:
        gc.enable()


def test_flash_attention_plans_no_step_of_sliding_layers_ahead(tmp_path, monkeypatch):
    """As it would for the only layers that it has in a model."""
    model = save_mixed("gemma3_text", tmp_path)
    save_mask(full_mask(model), model / "mask.yaml")
    config = config_of(model, {"mask": str(model / "mask.yaml"), "sink": 32, "recent": 64})
    spec = SlidingWindowSpec(
        block_size=32, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=48
    )
    arguments = spec, [], config, torch.device("cpu")
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: 3)
    base = flash_attn.FlashAttentionBackend
    sliding = resolve_obj_by_qualname(sliding_backend(f"{base.__module__}.{base.__name__}"))
    assert base.get_builder_cls()(*arguments).aot_schedule
    assert not sliding.get_builder_cls()(*arguments).aot_schedule


def test_capacity_counts_what_sliding_layers_keep():
    window, pool = Window(64, 256), 1 << 30
    alone = plan_of([[128, 128]] * 4, 128, 2)
    beside = plan_of([[128, 128]] * 4, 128, 2, sliding=SlidingLayers(20, 512))
    kept = 20 * 512 * 2 * 2 * 128 * 2
    for plan, extra in ((alone, 0), (beside, kept)):
        found = dense_capacity(plan, pool, 32768).in_decode
        assert found == pytest.approx(pool / (32768 * 4 * 2 * 2 * 128 * 2 + extra))
    # A block holds the window pages of four layers, so five groups; 512 tokens touch 17 pages.
    assert beside.blocks_in_decode(window, 32768) - alone.blocks_in_decode(window, 32768) == 5 * 17
    assert leank_capacity(beside, window, pool, 32768).in_decode < (
        leank_capacity(alone, window, pool, 32768).in_decode
    )


def test_kinds_of_layers():
    full, sliding = "full_attention", "sliding_attention"
    assert layer_kinds({"num_hidden_layers": 2}) == (full, full)
    assert layer_kinds({"num_hidden_layers": 1, "sliding_window": 64}) == (sliding,)
    unused = {"num_hidden_layers": 1, "sliding_window": 64, "use_sliding_window": False}
    assert layer_kinds(unused) == (full,)
    mixed = {"num_hidden_layers": 2, "layer_types": [sliding, full], "sliding_window": 64}
    assert sliding_layers({"text_config": mixed}) == SlidingLayers(1, 64)
    assert sliding_layers(mixed | {"layer_types": [full, full]}) is None
    with pytest.raises(UserError, match="no sliding_window"):
        sliding_layers(mixed | {"sliding_window": None})
