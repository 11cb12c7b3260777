"""The Triton kernels against the definition and against the reference.

Without a GPU they run in Triton's interpreter, which knows no bf16.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from archive_definition import CODED, EIGHT, PACKED
from cache_builder import CacheBuilder, relative_rms
from test_reference import mixed
from test_reference import serve as serve_long
from vllm_leank.kernels import decode, extend, launch, reference, store
from vllm_leank.kernels.cache import LayerCache

from vllm_leank.core.formats import NATIVE
from vllm_leank.core.window import Window
from vllm_leank.serving.step import attend_layer

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FP32, BF16, FP16 = (torch.float32, 2e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)
CODED_FP16 = (torch.float16, 6e-4)
"""Queries of codes are rounded to fp16 once more, times the distances of codes."""

pytestmark = pytest.mark.usefixtures("few_programs")
gpu = pytest.mark.gpu


def serve(builder):
    """Steps of a server: the reference's where a GPU is, else as few as show every kind."""
    if GPU:
        yield from serve_long(builder)
        return
    long, short = builder.add(120, 170), builder.add(20, 140)
    yield builder.step([(long, 119)])
    yield builder.step([(long, 1), (short, 120)], padded_rows=1, padded_tokens=2)
    yield builder.step([(long, 38)])
    yield builder.step([(long, 5), (short, 3)], padded_rows=1, padded_tokens=2)
    yield builder.step([(long, 1), (short, 1)], padded_rows=1, padded_tokens=1)


def attend(query, output, cache, batch, scale):
    """The kernels together. Exact prefill is FlashAttention's: the reference stands in for it."""
    decodes = batch.decodes
    if batch.num_decodes < batch.num_reqs:
        reference.attend(query, output, cache, batch.extends, scale)
        after_prompt = torch.zeros(len(query), dtype=torch.bool)
        for row in batch.extends.rows:
            exact = min(max(row.exact_until - row.before, 0), row.after - row.before)
            after_prompt[row.queries.start + exact : row.queries.stop] = True
        output[after_prompt] = float("nan")
        extend.extend(query, output, cache, batch.extends, scale)
    if decodes.num_reqs:
        decode.decode(query[: decodes.num_reqs], output, cache, decodes, scale)


KERNELS = SimpleNamespace(store=store.store, compact=store.compact, attend=attend)


@pytest.mark.parametrize(
    ("kept", "head_dim", "group", "window", "archive_block", "dtypes"),
    [
        ((32, 0), 64, 1, Window(0, 32), 32, (FP32, NATIVE)),
        (CODED[64][:2], 64, 1, Window(32, 64), 128, (CODED_FP16, PACKED)),
        (EIGHT, 128, 1, Window(32, 64), 128, (CODED_FP16, PACKED)),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (CODED[256][1:2], 256, 1, Window(64, 100), 128, (CODED_FP16, PACKED)),
                ((96, 0, 64), 96, 3, Window(64, 100), 96, (FP16, NATIVE)),
                ((112, 16), 128, 4, Window(32, 64), 64, (FP16, NATIVE)),
                ((48, 128), 128, 7, Window(32, 64), 128, (FP16, NATIVE)),
                ((256, 144), 256, 2, Window(32, 64), 32, (FP32, NATIVE)),
                ((0, 0), 64, 16, Window(32, 64), 64, (FP16, NATIVE)),
                (CODED[128][:1], 128, 4, Window(0, 32), 256, (CODED_FP16, PACKED)),
                (CODED[64][1:2], 64, 2, Window(32, 64), 2432, (CODED_FP16, PACKED)),
            )
        ),
        *(
            pytest.param(EIGHT, 128, group, Window(64, 100), 256, (BF16, PACKED), marks=gpu)
            for group in (1, 4, 7)
        ),
        *(
            pytest.param(
                CODED[head_dim], head_dim, group, window, block, (dtype, PACKED), marks=gpu
            )
            for window in (Window(0, 32), Window(64, 100))
            for head_dim in (64, 128, 256)
            for group in (1, 4, 7)
            for block, dtype in ((128, BF16), (256, CODED_FP16))
        ),
        *(
            pytest.param(
                mixed(head_dim), head_dim, group, window, block, (dtype, archive), marks=gpu
            )
            for window in (Window(0, 32), Window(64, 100), Window(128, 96))
            for head_dim, group, block, dtype, archive in (
                (64, 1, 64, BF16, NATIVE),
                (64, 8, 128, BF16, NATIVE),
                (96, 4, 96, BF16, NATIVE),
                (96, 3, 128, FP16, NATIVE),
                (128, 4, 64, BF16, NATIVE),
                (128, 7, 128, BF16, NATIVE),
                (128, 32, 96, FP16, NATIVE),
                (256, 2, 64, BF16, NATIVE),
                (256, 8, 128, BF16, NATIVE),
            )
        ),
    ],
)
def test_every_query_reads_what_the_rule_says(
    kept, head_dim, group, window, archive_block, dtypes, tma
):
    (dtype, tolerance), archive_format = dtypes
    if GPU and dtype is torch.float32:
        pytest.skip("the GPU's products round fp32 to tf32, and leank refuses fp32 there")
    builder = CacheBuilder(
        kept, head_dim, group, window, archive_block, dtype, archive_format, device=DEVICE
    )
    for step in serve(builder):
        output = builder.run(step, KERNELS)
        assert output.isfinite().all()
        assert relative_rms(output, step.expected) < tolerance


@pytest.mark.parametrize(
    ("kept", "head_dim", "archive_block", "window_block", "dtypes"),
    [
        ((48, 0), 64, 64, 64, (FP16, NATIVE)),
        (CODED[64][1:2], 64, 128, 96, (CODED_FP16, PACKED)),
        *(
            pytest.param(heads, head_dim, 128, window_block, dtypes, marks=gpu)
            for head_dim in (64, 128, 256)
            for window_block in (64, 96, 128)
            for heads, dtypes in (
                (mixed(head_dim), (BF16, NATIVE)),
                (CODED[head_dim], (BF16, PACKED)),
            )
        ),
    ],
)
def test_window_pages_of_several_granules(kept, head_dim, archive_block, window_block, dtypes, tma):
    """Their granules are read and compacted as those of pages of one. A page that the sink or the
    boundary is in is held, and its archived tokens are not read.
    """
    (dtype, tolerance), archive_format = dtypes
    builder = CacheBuilder(
        kept, head_dim, 2, Window(32, 64), archive_block, dtype, archive_format, device=DEVICE,
        window_block=window_block,
    )  # fmt: skip
    other = copy_of(builder.cache)
    for step in serve(builder):
        output = builder.run(step, KERNELS)
        assert relative_rms(output, step.expected) < tolerance
        reference.store(step.key, step.value, other, step.batch)
        reference.compact(other, step.batch)
        assert torch.equal(raw(builder.cache.archive_pages), raw(other.archive_pages))
        if step.batch.max_query_len == 1:
            store.update(step.key, step.value, other, step.batch)
            assert torch.equal(raw(builder.cache.archive_pages), raw(other.archive_pages))
            slots = step.batch.slots[step.batch.slots >= 0]
            pages, rows = slots // window_block, slots % window_block
            one, two = (c.window_pages[pages, :, rows] for c in (builder.cache, other))
            assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("kept", "head_dim", "group", "archive_block", "dtypes"),
    [
        pytest.param((16, 0), 32, 2, 64, (FP16, NATIVE), marks=pytest.mark.long),
        (CODED[64][1:3], 64, 2, 128, (CODED_FP16, PACKED)),
        *(
            pytest.param(CODED[head_dim], head_dim, group, block, (dtype, PACKED), marks=gpu)
            for head_dim, group in ((64, 4), (128, 1), (128, 7), (256, 4))
            for block, dtype in ((128, CODED_FP16), (256, BF16))
        ),
        pytest.param(mixed(128), 128, 4, 64, (BF16, NATIVE), marks=gpu),
        pytest.param(mixed(128), 128, 7, 128, (BF16, NATIVE), marks=gpu),
        pytest.param(mixed(96), 96, 3, 96, (FP16, NATIVE), marks=gpu),
        pytest.param(mixed(64), 64, 8, 128, (BF16, NATIVE), marks=gpu),
        pytest.param(mixed(256), 256, 2, 64, (BF16, NATIVE), marks=gpu),
    ],
)
def test_prompts_that_are_read_pruned(kept, head_dim, group, archive_block, dtypes, tma):
    """In chunks as long as many programs, and in what is left of them."""
    (dtype, tolerance), archive_format = dtypes
    builder = CacheBuilder(
        kept, head_dim, group, Window(32, 64, exact=False), archive_block, dtype, archive_format,
        device=DEVICE,
    )  # fmt: skip
    chunks = (289, 40, 1)
    requests = [builder.add(0, sum(chunks)) for _ in range(2 if GPU else 1)]
    for chunk in chunks:
        step = builder.step([(request, chunk) for request in requests])
        output = builder.run(step, KERNELS)
        assert output.isfinite().all()
        assert relative_rms(output, step.expected) < tolerance


@pytest.mark.parametrize(
    ("kept", "head_dim", "group", "archive_block", "dtypes"),
    [
        ((16, 0), 32, 3, 64, (FP16, NATIVE)),
        (CODED[64][1:2], 64, 2, 128, (CODED_FP16, PACKED)),
        *(
            pytest.param(heads, head_dim, 8, 128, dtypes, marks=gpu)
            for head_dim in (64, 128)
            for heads, dtypes in (
                (mixed(head_dim), (BF16, NATIVE)),
                (CODED[head_dim], (BF16, PACKED)),
            )
        ),
    ],
)
def test_models_with_attention_sinks(
    kept, head_dim, group, archive_block, dtypes, tma, monkeypatch
):
    """A sink counts once, whether a token is decoded by one program or by several, or extended."""
    (dtype, tolerance), archive_format = dtypes
    builder = CacheBuilder(
        kept, head_dim, group, Window(32, 64, exact=False), archive_block, dtype, archive_format,
        sinks=True, device=DEVICE,
    )  # fmt: skip
    request = builder.add(0, 164)
    builder.run(builder.step([(request, 145)]), reference)
    for tokens, split_bytes in ((17, 256), (1, 256), (1, 1 << 20)):
        monkeypatch.setattr(
            decode,
            "choose_decode",
            lambda *a, size=split_bytes: launch.choose_decode(*a)._replace(split_bytes=size),
        )
        builder.cache = replace(builder.cache)  # which has prepared nothing yet
        step = builder.step([(request, tokens)])
        output = builder.run(step, KERNELS)
        assert relative_rms(output, step.expected) < tolerance


@gpu
@pytest.mark.parametrize("window_block", [32, 96, 128])
@pytest.mark.parametrize("sinks", [False, True])
def test_prompts_that_are_read_exactly(sinks, window_block):
    """By FlashAttention, and what comes after them in many tokens by extend."""
    builder = CacheBuilder(
        (32, 0), 128, 8, Window(32, 64), 64, torch.bfloat16, sinks=sinks, device=DEVICE,
        window_block=window_block,
    )  # fmt: skip
    if window_block > 32:
        builder.cache.window_pages.zero_()  # as `WindowManager` has vLLM do
    request = builder.add(300, 330)
    for tokens in (170, 135, 25):
        step = builder.step([(request, tokens)])
        output = torch.full_like(step.query, float("nan"))
        new = step.query, step.key, step.value
        attend_layer(*new, output, builder.cache, step.batch, builder.scale)
        assert relative_rms(output, step.expected) < BF16[1]


@pytest.mark.parametrize(
    ("rows", "tile"),
    [*(pytest.param(*one, marks=pytest.mark.long) for one in ((16, 32), (64, 64))), (128, 128)],
)
def test_a_prompt_is_read_the_same_in_programs_and_tiles_of_any_size(monkeypatch, rows, tile, tma):
    """Tiles that sink tokens share with others, and rows on both sides of a boundary."""
    builder = CacheBuilder(
        (48, 0), 64, 3, Window(32, 64, exact=False), 128, torch.float16, device=DEVICE
    )
    chosen = extend.choose_extend
    monkeypatch.setattr(
        extend, "choose_extend", lambda *a: replace(chosen(*a), rows=rows, tile=tile)
    )
    request = builder.add(0, 330)
    for tokens in (40, 290):
        step = builder.step([(request, tokens)])
        output = builder.run(step, KERNELS)
        assert relative_rms(output, step.expected) < FP16[1]


@pytest.mark.parametrize(
    ("kept", "head_dim", "archive_block", "window", "archive_format"),
    [
        ((32, 0, 112), 128, 64, Window(32, 64), NATIVE),
        (CODED[64], 64, 128, Window(32, 64), PACKED),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ((96, 16), 96, 96, Window(32, 64), NATIVE),
                ((64, 48, 0), 64, 128, Window(64, 32), NATIVE),
                ((256, 80), 256, 32, Window(0, 32), NATIVE),
                (CODED[128], 128, 256, Window(64, 32), PACKED),
            )
        ),
        pytest.param(CODED[256], 256, 128, Window(0, 32), PACKED, marks=gpu),
    ],
)
def test_pages_are_those_of_the_reference(kept, head_dim, archive_block, window, archive_format):
    """Bit by bit, padding and what was never written included."""
    builder = CacheBuilder(
        kept, head_dim, 1, window, archive_block, torch.float16, archive_format, device=DEVICE
    )
    cache = builder.cache
    other = copy_of(cache)
    for step in serve(builder):
        reference.store(step.key, step.value, cache, step.batch)
        reference.compact(cache, step.batch)
        if step.batch.max_query_len == 1:
            store.update(step.key, step.value, other, step.batch)
        else:
            store.store(step.key, step.value, other, step.batch)
            store.compact(other, step.batch)
        assert torch.equal(raw(cache.archive_pages), raw(other.archive_pages))
        slots = step.batch.slots[step.batch.slots >= 0]
        for pages in (cache.window_pages, other.window_pages):
            assert pages[slots // 32, :, slots % 32].isfinite().all()
        one, two = (c.window_pages[slots // 32, :, slots % 32] for c in (cache, other))
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "num_reqs", [1, 3, pytest.param(64, marks=gpu), pytest.param(256, marks=gpu)]
)
def test_decode_at_every_length_around_the_edges(num_reqs, tma):
    """Lengths around pages, tiles and boundaries, many requests at once, and padded rows."""
    window = Window(32, 64)
    builder = CacheBuilder(
        (32, 0, 48), 64, 4, window, 64, torch.float16, num_blocks=64 + 24 * num_reqs, device=DEVICE
    )
    # The last and the first of a boundary come first, for the few requests of the interpreter.
    lengths = [127, 128, 160, 2, 31, 32, 33, 34, 96, 97, 129, 159, 161, 191, 256, 257, 319, 321]
    requests = [builder.add(1 + i % 7, lengths[i % len(lengths)]) for i in range(num_reqs)]
    for request in requests:
        builder.run(builder.step([(request, len(request) - 1)]), reference)
    step = builder.step([(request, 1) for request in requests], padded_rows=3, padded_tokens=3)
    pages = [raw(builder.cache.window_pages), raw(builder.cache.archive_pages)]
    nobodys = [part[0].clone() for part in pages]
    store.update(step.key, step.value, builder.cache, step.batch)
    output = torch.full_like(step.query, float("nan"))
    decode.decode(step.query, output, builder.cache, step.batch, builder.scale)
    assert relative_rms(output[:num_reqs], step.expected) < FP16[1]
    assert not output[num_reqs:].any()
    assert all(torch.equal(part[0], before) for part, before in zip(pages, nobodys, strict=True))


def raw(pages):
    return pages.view(torch.uint8)


def copy_of(cache):
    return LayerCache(
        cache.window_pages.clone(),
        raw(cache.archive_pages).clone().view(cache.archive_pages.dtype),
        cache.layout,
        cache.heads,
        cache.window,
    )
