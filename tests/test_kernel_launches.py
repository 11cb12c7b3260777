"""How the Triton kernels are launched: over how many programs, with what prepared, at which
addresses, and in graphs. What they compute is watched by `test_kernels.py`.
"""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from archive_definition import CODED, PACKED
from cache_builder import CacheBuilder, relative_rms
from test_kernels import (
    BF16,
    CODED_FP16,
    DEVICE,
    FP16,
    GPU,
    KERNELS,
    attend,
    copy_of,
    gpu,
    raw,
)
from vllm_leank.kernels import decode, launch, reference, store

from vllm_leank.core.formats import NATIVE
from vllm_leank.core.profile import Profile
from vllm_leank.core.window import Window

pytestmark = pytest.mark.usefixtures("few_programs")


def test_a_request_split_over_many_programs_reads_the_same(monkeypatch, tma):
    builder = CacheBuilder((64, 32), 64, 4, Window(32, 64), 64, torch.float16, device=DEVICE)
    request = builder.add(10, 1000 if GPU else 400)
    builder.run(builder.step([(request, len(request) - 1)]), reference)
    step = builder.step([(request, 1)])
    outputs = []
    for split_bytes, combined, parts in (
        (256, 128, 4),
        (256, 16, 1),
        (4096, 16, 2),
        (1 << 20, 16, 1),
    ):
        changes = {"split_bytes": split_bytes, "combined": combined, "parts": parts}
        monkeypatch.setattr(
            decode,
            "choose_decode",
            lambda *a, changes=changes: launch.choose_decode(*a)._replace(**changes),
        )
        cache = replace(builder.cache)  # which has prepared nothing yet
        store.update(step.key, step.value, cache, step.batch)
        output = torch.full_like(step.query, float("nan"))
        decode.decode(step.query, output, cache, step.batch, builder.scale)
        assert relative_rms(output, step.expected) < FP16[1]
        outputs.append(output)


TWO = Profile(k4=32, k2=64, v2=128)


@pytest.mark.parametrize("group", [2, 7])
def test_many_requests_take_longer_tiles_and_read_the_same(monkeypatch, tma, group):
    monkeypatch.setattr(launch, "FEW_HEADS", 0)
    monkeypatch.setattr(launch, "choose_decode", launch.choose_decode.__wrapped__)
    monkeypatch.setattr(decode, "choose_decode", launch.choose_decode)
    builder = CacheBuilder(
        (CODED[128][1], TWO), 128, group, Window(64, 96), 256, torch.float16, archive_format=PACKED,
        device=DEVICE,
    )  # fmt: skip
    lengths = [700, 390, 288, 161]
    requests = [builder.add(9, length) for length in lengths]
    for request in requests:
        builder.run(builder.step([(request, len(request) - 1)]), reference)
    step = builder.step([(request, 1) for request in requests])
    cache = builder.cache
    store.update(step.key, step.value, cache, step.batch)
    assert launch.choose_decode(4, cache.layout, cache.tables.device).tile == 2 * cache.tables.tile
    output = torch.full_like(step.query, float("nan"))
    decode.decode(step.query, output, cache, step.batch, builder.scale)
    assert relative_rms(output, step.expected) < CODED_FP16[1]


@pytest.mark.parametrize("rows", [128, 0], ids=["counted", "uncounted"])
def test_a_long_request_among_many_has_programs_to_spare(monkeypatch, tma, rows):
    """As many as it has parts, where lengths are counted, else as many as all have; those of a head
    follow each other, each has a part of its own of the results, and one program more combines
    them, more than it loads at once among them. Padded rows have none.
    """
    parts, heads = 8, (CODED[128][1], TWO, Profile())
    monkeypatch.setattr(launch, "FEW_HEADS", 0)
    monkeypatch.setattr(launch, "SPLIT_BYTES", (256, 256))
    monkeypatch.setattr(launch, "whole_waves", lambda heads, wave: parts * heads)
    monkeypatch.setattr(launch, "COUNTED_REQUESTS", (rows,))
    monkeypatch.setattr(launch, "COMBINED", (4, 32, 128))
    monkeypatch.setattr(launch, "choose_decode", launch.choose_decode.__wrapped__)
    monkeypatch.setattr(decode, "choose_decode", launch.choose_decode)
    builder = CacheBuilder(
        heads, 128, 2, Window(64, 96), 256, torch.float16, archive_format=PACKED, device=DEVICE
    )
    requests = [builder.add(9, length) for length in (40, 1500, 170)]
    for request in requests:
        builder.run(builder.step([(request, len(request) - 1)]), reference)
    step = builder.step([(request, 1) for request in requests], padded_rows=5, padded_tokens=5)
    cache = builder.cache
    store.update(step.key, step.value, cache, step.batch)
    made, scratch = [], decode._scratch

    def noted(*shape):
        made[:] = (torch.full_like(one, float("nan")) for one in scratch(*shape))
        return made[0], made[1]

    monkeypatch.setattr(decode, "_scratch", noted)
    output = torch.full_like(step.query, float("nan"))
    decode.decode(step.query, output, cache, step.batch, builder.scale)
    assert relative_rms(output[:3], step.expected) < CODED_FP16[1]
    assert not output[3:].any()
    # One whose head has no other program writes its output, and leaves nothing to combine.
    used = made[1].isfinite().all(-1)
    found = launch.choose_decode(8, cache.layout, cache.tables.device)
    assert found.programs == used.shape[1]
    assert found.programs == (3 * parts * 4 if rows else 3 * parts + 2)
    # None that works comes after one that does not.
    counts = used.sum(1)
    assert torch.equal(used, torch.arange(found.programs, device=DEVICE) < counts[:, None])
    assert counts.tolist() == [6, 28 if rows else 22, 18, 0, 0, 0, 0, 0]


@pytest.mark.skipif(GPU, reason="other tests show it there, where programs run at once")
@pytest.mark.parametrize("group", [1, 4, 5])
def test_programs_keep_to_their_own_memory(monkeypatch, tma, group):
    """Their memory has guards at both ends here. In the interpreter, where programs run in turn,
    one that writes into its neighbour's spoils nothing, but the last one writes into a guard.
    """
    heads = 8 * CODED[64][:2]
    builder = CacheBuilder(
        heads, 64, group, Window(32, 64), 64, torch.float16, archive_format=PACKED, device=DEVICE
    )
    request = builder.add(10, 400)
    builder.run(builder.step([(request, len(request) - 1)]), reference)
    step = builder.step([(request, 1)])
    store.update(step.key, step.value, builder.cache, step.batch)
    made = []

    def scratch(batch, num_reqs, programs, group, head_dim):
        # So the last one works as well.
        assert programs == len(heads)
        shape = num_reqs, programs, group, head_dim
        size = num_reqs * programs * group * head_dim
        made.append(torch.full([3 * size], 7.0, device=DEVICE))
        partial = made[0][size : 2 * size].view(shape)
        return partial, torch.empty_like(partial[..., 0])

    monkeypatch.setattr(decode, "_scratch", scratch)
    output = torch.full_like(step.query, float("nan"))
    decode.decode(step.query, output, builder.cache, step.batch, builder.scale)
    assert relative_rms(output, step.expected) < CODED_FP16[1]
    before, _, after = made[0].chunk(3)
    assert (before == 7).all()
    assert (after == 7).all()


@pytest.mark.parametrize("queries", [1, 3])
def test_what_a_step_prepared_goes_with_it(queries):
    """It is memory of a GPU, and Python looks for circles seldom; while graphs are made, never."""
    builder = CacheBuilder((32, 0), 64, 1, Window(0, 32), 32, torch.float16, device=DEVICE)
    request = builder.add(10, 80)
    builder.run(builder.step([(request, len(request) - queries)]), reference)
    step = builder.step([(request, queries)])
    store.update(step.key, step.value, builder.cache, step.batch)
    attend(step.query, torch.empty_like(step.query), builder.cache, step.batch, builder.scale)
    assert step.batch.decodes._prepared
    seen = weakref.ref(step.batch), weakref.ref(step.batch.decodes)
    gc.disable()
    try:
        del step
        assert [one() for one in seen] == [None, None]
    finally:
        gc.enable()


@gpu
def test_addresses_beyond_two_to_the_31_elements(tma):
    """Pools of more than 4 GiB, in which a request has the last pages."""
    builder = CacheBuilder((96, 32), 128, 4, Window(32, 64), 64, torch.bfloat16, device=DEVICE)
    small = builder.cache
    smallest = min(small.archive_pages.shape[1], small.window_pages[0].numel())
    pages = 1 + (1 << 31) // smallest + 160
    large = replace(
        small,
        window_pages=torch.empty(
            (pages, *small.window_pages.shape[1:]), dtype=torch.bfloat16, device=DEVICE
        ),
        archive_pages=torch.empty(
            (pages, small.archive_pages.shape[1]), dtype=torch.bfloat16, device=DEVICE
        ),
    )
    assert large.archive_pages.numel() > 1 << 31
    builder.cache = large
    builder._free = [*range(pages - 100, pages)]
    request = builder.add(300, 420)
    for tokens in (300, 117, 1, 1, 1):
        output = builder.run(builder.step([(request, tokens)]), KERNELS)
    assert builder.cache.window_pages.numel() > 1 << 31
    assert min(request.archive_row) > pages - 200
    expected = request.expected[-1:]
    assert relative_rms(output, expected) < BF16[1]


@gpu
@pytest.mark.parametrize("archive_format", [NATIVE, PACKED])
def test_a_captured_graph_replays_like_eager_launches(archive_format):
    """One graph over 50 batches of changing size, length, tables and boundary crossings."""
    builder = CacheBuilder(
        (64, 0, 32), 128, 4, Window(32, 64), 128, torch.bfloat16, archive_format,
        num_blocks=600, device=DEVICE,
    )  # fmt: skip
    rows, cache = 16, builder.cache
    requests = [builder.add(3 + 11 * i, 700) for i in range(12)]
    for request in requests:
        builder.run(
            builder.step([(request, request.prompt + 290 % (31 + request.prompt))]), reference
        )
    width = 700 // 32 + 8
    fixed = None
    graph = torch.cuda.CUDAGraph()
    for i in range(50):
        chosen = [r for j, r in enumerate(requests) if (i + j) % (2 + i % 3) or not j]
        step = builder.step(
            [(r, 1) for r in chosen], padded_rows=rows - len(chosen),
            padded_tokens=rows - len(chosen),
        )  # fmt: skip
        batch = replace(
            step.batch,
            window_table=wide(step.batch.window_table, width),
            archive_table=wide(step.batch.archive_table, width),
            slots=step.batch.slots.long(),
        )
        inputs = [step.query, step.key, step.value, *tensors(batch)]
        if fixed is None:
            fixed = [x.clone() for x in inputs]
            output = torch.empty_like(step.query)
            static = with_tensors(batch, fixed[3:])
            before = copy_of(cache)

            def launch_all(fixed=fixed, static=static, output=output):
                store.update(fixed[1], fixed[2], cache, static)
                decode.decode(fixed[0], output, cache, static, builder.scale)

            launch_all()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                launch_all()
            cache.window_pages.copy_(before.window_pages)
            raw(cache.archive_pages).copy_(raw(before.archive_pages))
        for static_input, new in zip(fixed, inputs, strict=True):
            static_input.copy_(new)
        eager = torch.full_like(output, 7.0)
        twin = copy_of(cache)
        store.update(step.key, step.value, twin, batch)
        decode.decode(step.query, eager, twin, batch, builder.scale)
        output.fill_(float("nan"))
        graph.replay()
        assert torch.equal(output, eager)
        assert torch.equal(raw(cache.archive_pages), raw(twin.archive_pages))
        assert relative_rms(output[: len(chosen)], step.expected) < BF16[1]


def tensors(batch):
    return [
        batch.query_start_loc, batch.seq_lens, batch.exact_until, batch.window_table,
        batch.archive_table, batch.slots,
    ]  # fmt: skip


def with_tensors(batch, values):
    names = ("query_start_loc", "seq_lens", "exact_until", "window_table", "archive_table", "slots")
    return replace(batch, **dict(zip(names, values, strict=True)))


def wide(table, width):
    return torch.nn.functional.pad(table, (0, width - table.shape[1]))
