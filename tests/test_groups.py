"""vLLM's own planner over leank's specs: two groups, no wasted memory and no overlap, any mask."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from archive_definition import plan_of
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_max_concurrency_for_kv_cache_config,
)
from vllm.v1.kv_cache_interface import iter_layer_specs
from vllm_cache import cache_configs, cache_specs, vllm_config
from vllm_planning import get_kv_cache_groups

from vllm_leank.core.formats import known_formats
from vllm_leank.core.layers import SlidingLayers
from vllm_leank.core.pages import LEAST_BLOCK
from vllm_leank.core.states import StateLayers
from vllm_leank.core.window import Window
from vllm_leank.serving.scheduler.specs import ArchiveSpec, WindowSpec

WINDOW = Window(64, 256)
LENGTH = 8192
HEAD_DIM = 128
COUNTS = (0, 16, 32, 48, 64, 80, 96, 112, 128)


def random_mask(rng, layers, heads):
    return [[rng.choice(COUNTS) for _ in range(heads)] for _ in range(layers)]


def equal(rng, layers, heads):
    return [[rng.choice(COUNTS)] * heads] * layers


def all_full(rng, layers, heads):
    return [[HEAD_DIM] * heads] * layers


def all_empty(rng, layers, heads):
    return [[0] * heads] * layers


def some_layers_empty(rng, layers, heads):
    return [
        [0] * heads if rng.random() < 0.5 else layer for layer in random_mask(rng, layers, heads)
    ]


def size_patterns(heads):
    """One layer of each possible page size."""
    patterns = {}
    for empty in range(heads + 1):
        kept = [0] * empty + [16] * (heads - empty)
        while True:
            patterns.setdefault(sum(count + HEAD_DIM for count in kept if count), list(kept))
            grow = next((i for i, count in enumerate(kept) if 0 < count < HEAD_DIM), None)
            if grow is None:
                break
            kept[grow] += 16
    return list(patterns.values())


def all_sizes_differ(rng, layers, heads):
    patterns = size_patterns(heads)
    return rng.sample(patterns, min(layers, len(patterns)))


def sizes_in_equal_counts(rng, layers, heads):
    repeats = rng.choice([2, 3, 4])
    mask = rng.sample(size_patterns(heads), max(layers // repeats, 2)) * repeats
    rng.shuffle(mask)
    return mask


def few_sizes(rng, layers, heads):
    return rng.choices(rng.sample(size_patterns(heads), 3), k=layers)


MASKS = (
    random_mask,
    equal,
    all_full,
    all_empty,
    some_layers_empty,
    all_sizes_differ,
    sizes_in_equal_counts,
    few_sizes,
)


def pages(config):
    """First byte and end within a block of each layer's page, per group."""
    specs = {
        name: spec
        for group in config.kv_cache_groups
        for name, spec in zip(group.layer_names, layer_specs(group), strict=True)
    }
    found = {}
    for tensor in config.kv_cache_tensors:
        for i, name in enumerate(tensor.layers):
            first = tensor.offset + i * tensor.layer_stride
            found[name] = (first, first + specs[name].page_size_bytes, tensor)
    return [[found[name] for name in group.layer_names] for group in config.kv_cache_groups]


def random_stages(rng, layers):
    """One to three pipeline stages."""
    cuts = sorted(rng.sample(range(1, layers), min(rng.randrange(3), layers - 1)))
    return [end - first for first, end in pairwise([0, *cuts, layers])]


def layer_specs(group):
    specs = list(iter_layer_specs(group.kv_cache_spec))
    return specs if len(specs) > 1 else specs * len(group.layer_names)


@pytest.mark.parametrize("make", MASKS)
def test_any_mask_gives_two_groups_that_fill_the_memory_without_overlap(make):
    rng = random.Random(make.__name__)
    for _ in range(65):
        heads = rng.choice([1, 2, 4, 8])
        tp_size = rng.choice([1, 1, 2, 4, 8])
        mask = make(rng, rng.choice([1, 2, 3, 4, 6, 8, 16]), heads)
        plan = plan_of(
            mask,
            HEAD_DIM,
            rng.choice([2, 4]),
            tp_size,
            rng.choice(known_formats()),
            stages=random_stages(rng, len(mask)),
        )
        stage_bytes = plan.block_bytes // len(plan.stages)
        memory = stage_bytes * rng.randint(600, 5000) + rng.randrange(stage_bytes)
        configs = cache_configs(plan, WINDOW, memory, LENGTH)

        assert len(configs) == tp_size * len(plan.stages)
        for worker, config in enumerate(configs):
            layers = plan.stages[worker // tp_size]
            kinds = [type(layer_specs(group)[0]) for group in config.kv_cache_groups]
            assert kinds == [ArchiveSpec, WindowSpec], mask
            assert config.num_blocks == memory // stage_bytes
            assert [len(group) for group in pages(config)] == [1, layers]
            for group in pages(config):
                group.sort(key=lambda page: page[0])
                assert all(end <= first for (_, end, _), (first, _, _) in pairwise(group))
                assert all(first % 512 == 0 for first, _, _ in group)
                assert group[0][0] == 0
                assert group[-1][1] <= stage_bytes
                for _, end, tensor in group:
                    assert end <= tensor.block_stride <= stage_bytes


@pytest.mark.parametrize("archive_format", known_formats(), ids=lambda one: one.name)
@pytest.mark.parametrize("layers", [32, 80])
@pytest.mark.parametrize("make", [random_mask, all_sizes_differ, sizes_in_equal_counts])
def test_large_models_give_two_groups(make, layers, archive_format):
    mask = make(random.Random(layers), layers, 8)
    plan = plan_of(mask, HEAD_DIM, 2, archive_format=archive_format)
    assert len(get_kv_cache_groups(vllm_config(LENGTH), cache_specs(plan, WINDOW))) == 2


@pytest.mark.parametrize("draft_heads", [1, 2, 4])
def test_layers_of_a_draft_model_lie_in_the_window_group(draft_heads):
    plan = plan_of(random_mask(random.Random(0), 4, 2), HEAD_DIM, 2)
    specs = cache_specs(plan, WINDOW)
    window = next(spec for spec in specs.values() if isinstance(spec, WindowSpec))
    for layer in range(4, 8):
        specs[f"model.layers.{layer}.attn"] = replace(window, num_kv_heads=draft_heads)
    groups = get_kv_cache_groups(vllm_config(LENGTH), specs)
    assert [len(group.layer_names) for group in groups] == [1, 8]


def test_vllm_counts_a_request_of_full_length_as_it_is_in_prefill():
    plan = plan_of(random_mask(random.Random(1), 6, 4), HEAD_DIM, 2)
    blocks = plan.blocks_in_prefill(WINDOW, LENGTH)
    # One more block: vLLM keeps one for itself.
    config = cache_configs(plan, WINDOW, plan.block_bytes * (blocks + 1), LENGTH)[0]
    concurrency = get_max_concurrency_for_kv_cache_config(vllm_config(LENGTH), config)
    assert concurrency == (blocks + 1) / blocks
    with pytest.raises(ValueError, match="larger than the available KV cache memory"):
        cache_configs(plan, WINDOW, plan.block_bytes * blocks, LENGTH)


def config_of_one_request(plan):
    """vLLM's cache for one request, whose blocks it counts as the plan does."""
    config = vllm_config(LENGTH)
    blocks = plan.blocks_in_prefill(WINDOW, LENGTH, config.max_in_flight_tokens)
    # One more block: vLLM keeps one for itself.
    (found,) = cache_configs(plan, WINDOW, plan.block_bytes * (blocks + 1), LENGTH)
    assert found.num_blocks == blocks + 1
    concurrency = get_max_concurrency_for_kv_cache_config(config, found)
    assert concurrency == (blocks + 1) / blocks
    kinds = Counter(type(layer_specs(group)[0]) for group in found.kv_cache_groups)
    assert kinds[ArchiveSpec] == kinds[WindowSpec] == 1
    return found


@pytest.mark.parametrize("make", MASKS)
def test_pages_of_sliding_layers_lie_in_the_same_blocks(make):
    """In groups of their own, which make no block larger, counted as vLLM counts them."""
    rng = random.Random(make.__name__)
    for _ in range(8):
        mask = make(rng, rng.choice([1, 2, 4, 10]), rng.choice([1, 2, 4]))
        sliding = SlidingLayers(rng.randint(1, 60), rng.choice([1, 32, 100, 1024, 100_000]))
        made = plan_of(mask, HEAD_DIM, 2, archive_format=rng.choice(known_formats()))
        plan = replace(made, sliding=sliding)
        found = config_of_one_request(plan)
        assert found.needs_kv_cache_zeroing
        for group in pages(found):
            group.sort(key=lambda page: page[0])
            assert all(end <= first for (_, end, _), (first, _, _) in pairwise(group))
            assert group[-1][1] <= plan.block_bytes


@pytest.mark.parametrize("make", MASKS)
def test_states_lie_in_the_same_blocks(make):
    """In groups of their own, as many in a block as fit, counted as vLLM counts them."""
    rng = random.Random(make.__name__)
    for size in (512, 20_480, 300_032, 4_194_304):
        mask = make(rng, rng.choice([1, 2, 4, 10]), rng.choice([1, 2, 4]))
        states = StateLayers(rng.randint(1, 60), size)
        plan = plan_of(mask, HEAD_DIM, 2, archive_format=rng.choice(known_formats()), states=states)
        found = config_of_one_request(plan)
        for group in pages(found):
            assert max(end for _, end, _ in group) <= plan.block_bytes


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_ranks_have_pages_of_one_length_beside_states(tp_size):
    """Block tables are the same on all ranks, whatever the mask keeps of their heads: as long as
    kernels read them there, and with room for all that they store.
    """
    rng = random.Random(tp_size)
    for size in (20_480, 300_032, 4_194_304):
        mask = random_mask(rng, 6, 4)
        made = {"archive_format": rng.choice(known_formats()), "states": StateLayers(20, size)}
        plan = plan_of(mask, HEAD_DIM, 2, tp_size, **made)
        configs = cache_configs(plan, WINDOW, 1000 * plan.block_bytes, LENGTH)
        assert len(configs) == tp_size
        for rank, config in enumerate(configs):
            assert config.num_blocks == 1000
            archive, window = (
                next(
                    spec
                    for group in config.kv_cache_groups
                    if isinstance(spec := layer_specs(group)[0], kind)
                )
                for kind in (ArchiveSpec, WindowSpec)
            )
            layers = [plan.layer(index, rank) for index in range(len(mask))]
            for layer in layers:
                assert layer.archive_block == archive.block_size == plan.archive_block
                assert layer.window_block == window.block_size == plan.window_block
                assert layer.window_page_bytes == window.page_size_bytes
            stored = sum(layer.archive_page_bytes for layer in layers)
            assert stored <= archive.page_size_bytes <= plan.block_bytes
    assert plan.window_block > LEAST_BLOCK


def test_the_scheduler_sees_one_spec_per_group():
    plan = plan_of(random_mask(random.Random(2), 6, 4), HEAD_DIM, 2)
    config = generate_scheduler_kv_cache_config(cache_configs(plan, WINDOW, 10**9, LENGTH))
    archive, window = (group.kv_cache_spec for group in config.kv_cache_groups)
    assert isinstance(archive, ArchiveSpec)
    assert archive.block_size == plan.archive_block
    assert isinstance(window, WindowSpec)
    assert window.block_size == LEAST_BLOCK
    assert archive.window == window.window == WINDOW


def test_generators_make_what_they_are_named_after():
    rng = random.Random(0)

    def counts(mask):
        sizes = [sum(count + HEAD_DIM for count in layer if count) for layer in mask]
        return Counter(Counter(sizes).values())

    assert set(counts(all_sizes_differ(rng, 16, 4))) == {1}
    assert len(counts(sizes_in_equal_counts(rng, 16, 4))) == 1
    assert len({tuple(layer) for layer in equal(rng, 16, 4)}) == 1
