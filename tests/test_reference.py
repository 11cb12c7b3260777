"""The reference kernels against the definition; memory that nobody wrote is NaN."""

import pytest
import torch
from archive_definition import PACKED
from cache_builder import CacheBuilder, relative_rms
from vllm_leank.kernels import reference

from vllm_leank.core.formats import NATIVE, known_formats
from vllm_leank.core.profile import Profile
from vllm_leank.core.window import MOST, Window

COUNTS = (0, 16, 32, 48, 64, 96, 112, 128, 256)
FP32_ERROR = 2e-6
"""In what order a product sums, and so its rounding, is the processor's: up to 1.04e-6 was seen."""

FP32, BF16, FP16 = (torch.float32, FP32_ERROR), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)


def mixed(head_dim):
    """Head layouts that hold every kept count the head size allows, the first keeping nothing."""
    return tuple(count for count in COUNTS if count <= head_dim)


def serve(builder):
    """Steps of a server: chunks of prompts, decode, a few tokens at once as speculative decoding
    has them, and replayed answers, side by side.
    """
    long, short, tiny = builder.add(310, 330), builder.add(20, 270), builder.add(1, 120)
    yield builder.step([(long, 70), (short, 10)])
    yield builder.step([(long, 239), (short, 190), (tiny, 1)], padded_rows=2, padded_tokens=3)
    yield builder.step([(tiny, 100), (long, 1), (short, 1)])
    yield builder.step([(long, 3), (short, 16), (tiny, 2)], padded_rows=1, padded_tokens=2)
    yield builder.step([(tiny, 1), (long, 2), (short, 12)])  # across a boundary
    yield builder.step([(long, 1), (short, 33), (tiny, 1)], padded_rows=1)
    for _ in range(3):
        yield builder.step([(short, 1), (long, 1), (tiny, 1)], padded_tokens=5)


@pytest.mark.parametrize(
    "window",
    [
        pytest.param(Window(0, 32), marks=pytest.mark.long),
        pytest.param(Window(32, 64), marks=pytest.mark.long),
        Window(64, 100),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("head_dim", "group", "archive_block", "dtype", "tolerance"),
    [
        (64, 1, 32, *FP32),
        pytest.param(64, 4, 64, *BF16, marks=pytest.mark.long),
        (96, 2, 64, *FP32),
        pytest.param(96, 1, 96, *FP16, marks=pytest.mark.long),
        (128, 4, 64, *FP32),
        pytest.param(128, 2, 96, *BF16, marks=pytest.mark.long),
        pytest.param(128, 1, 32, *FP16, marks=pytest.mark.long),
        (256, 2, 32, *FP32),
        pytest.param(256, 4, 96, *BF16, marks=pytest.mark.long),
        pytest.param(256, 1, 64, *FP16, marks=pytest.mark.long),
    ],
)
def test_every_query_reads_what_the_rule_says(
    head_dim, group, archive_block, dtype, tolerance, window
):
    builder = CacheBuilder(mixed(head_dim), head_dim, group, window, archive_block, dtype)
    for step in serve(builder):
        output = builder.run(step, reference)
        assert output.isfinite().all()
        assert relative_rms(output, step.expected) < tolerance


@pytest.mark.parametrize(
    "window",
    [pytest.param(Window(0, 32), marks=pytest.mark.long), Window(64, 100)],
    ids=str,
)
@pytest.mark.parametrize(
    ("head_dim", "group", "archive_block", "dtype", "tolerance"),
    [
        (64, 2, 128, *FP32),
        (96, 1, 256, *FP16),
        (128, 4, 128, *BF16),
        (256, 1, 384, torch.float32, 2e-6),
    ],
)
def test_a_packed_archive(head_dim, group, archive_block, dtype, tolerance, window):
    """Heads of all classes, of K or V alone, and of none."""
    heads = (*mixed(head_dim), Profile(k4=32), Profile(v2=64), Profile(k2=64, v8=16))
    builder = CacheBuilder(heads, head_dim, group, window, archive_block, dtype, PACKED)
    for step in serve(builder):
        output = builder.run(step, reference)
        assert output.isfinite().all()
        assert relative_rms(output, step.expected) < tolerance


def test_channels_that_are_not_kept_are_read_as_their_means():
    """Where the mask says them."""
    builder = CacheBuilder(mixed(128), 128, 2, Window(32, 64), means=True)
    for step in serve(builder):
        assert relative_rms(builder.run(step, reference), step.expected) < FP32_ERROR


@pytest.mark.parametrize("archive_format", [NATIVE, PACKED], ids=str)
@pytest.mark.parametrize("exact", [True, False])
def test_models_with_attention_sinks(exact, archive_format):
    window = Window(32, 64, exact=exact)
    builder = CacheBuilder((16, 0, 64), 64, 2, window, archive_format=archive_format, sinks=True)
    requests = [builder.add(prompt if exact else 0, 200) for prompt in (1, 150)]
    for tokens in (120, 77, 1, 2):
        step = builder.step([(request, tokens) for request in requests])
        assert relative_rms(builder.run(step, reference), step.expected) < FP32_ERROR


@pytest.mark.parametrize(
    ("archive_format", "window_block"), [(NATIVE, 64), (PACKED, 96), (NATIVE, 128)], ids=str
)
def test_window_pages_of_several_granules(archive_format, window_block):
    builder = CacheBuilder(
        (16, 0), 64, 2, Window(32, 64), archive_format=archive_format, num_blocks=40,
        window_block=window_block,
    )  # fmt: skip
    request, chunks = builder.add(150, 400), (149, 2, *(1,) * 40, 67, 142)
    output = torch.cat([builder.run(builder.step([(request, n)]), reference) for n in chunks])
    assert relative_rms(output, request.expected) < FP32_ERROR
    archive = raw(builder.cache.archive_pages)
    for page, positions, content in builder.archive_bytes(request, range(32, 320)):
        assert archive[page, positions].equal(content)


@pytest.mark.parametrize("kept", [(0, 0), (32, 32), (128, 128)])
def test_masks_with_equal_heads(kept):
    builder = CacheBuilder(kept, 128, 2, Window(32, 64))
    for step in serve(builder):
        assert relative_rms(builder.run(step, reference), step.expected) < FP32_ERROR


@pytest.mark.parametrize("window", [Window(0, 32), Window(64, 100)], ids=str)
@pytest.mark.parametrize("max_scores", [1, 5000])
def test_long_replays_are_computed_in_parts(window, max_scores, monkeypatch):
    monkeypatch.setattr(reference, "MAX_SCORES", max_scores)
    builder = CacheBuilder((0, 48), 64, 2, window)
    request = builder.add(100, 300)
    step = builder.step([(request, 300)])
    assert relative_rms(builder.run(step, reference), step.expected) < FP32_ERROR


@pytest.mark.parametrize(
    "chunks",
    [
        [400],
        [200] * 2,
        [1] * 400,
        [37] * 10 + [30],
        [149, 1, 250],
        [150, 250],
        [151, 249],
        [399, 1],
    ],
    ids=lambda chunks: f"{len(chunks)} steps from {chunks[0]}",
)
@pytest.mark.parametrize(
    "archive_format", [pytest.param(NATIVE, marks=pytest.mark.long), PACKED], ids=str
)
def test_chunks_do_not_change_the_result(chunks, archive_format):
    builder = CacheBuilder(
        (16, 0, 96), 128, 2, Window(32, 64), archive_format=archive_format, num_blocks=40
    )
    request = builder.add(150, 400)
    output = torch.cat([builder.run(builder.step([(request, n)]), reference) for n in chunks])
    assert relative_rms(output, request.expected) < FP32_ERROR
    archive = raw(builder.cache.archive_pages)
    for page, positions, content in builder.archive_bytes(request, range(32, 320)):
        assert archive[page, positions].equal(content)


@pytest.mark.parametrize("hit", [32, 64, 192, 288])
def test_a_prefix_hit_does_not_change_the_result(hit):
    builder = CacheBuilder((64, 0), 128, 2, Window(32, 64))
    first = builder.add(290, 400)
    builder.run(builder.step([(first, 290)]), reference)
    second = builder.share(first, prompt=300, hit=hit)
    for tokens in [(299 - hit), 1, 50, 1, 1]:
        step = builder.step([(second, tokens)])
        assert relative_rms(builder.run(step, reference), step.expected) < FP32_ERROR


def test_a_sink_longer_than_any_request_costs_nothing():
    """Its tokens are not there to be read."""
    builder = CacheBuilder((64, 0), 128, 2, Window(MOST, 64))
    first, second = builder.add(290, 400), builder.add(20, 60)
    for tokens in [[(first, 290), (second, 20)], [(second, 1), (first, 1)], [(first, 9)]]:
        step = builder.step(tokens)
        assert relative_rms(builder.run(step, reference), step.expected) < FP32_ERROR


def raw(pages):
    """Bytes of pages, in which NaN equals NaN."""
    return pages.clone().view(torch.uint8)


def test_store_writes_its_own_slots_only():
    builder = CacheBuilder((32, 0), 64, 2, Window(32, 64))
    a, b = builder.add(200, 200), builder.add(50, 60)
    builder.run(builder.step([(a, 101), (b, 50)]), reference)
    step = builder.step([(a, 40), (b, 1)], padded_tokens=2)
    wanted, archive = builder.cache.window_pages.clone(), raw(builder.cache.archive_pages)
    reference.store(step.key, step.value, builder.cache, step.batch)
    assert raw(builder.cache.archive_pages).equal(archive)
    for request, tokens in [(a, range(101, 141)), (b, range(50, 51))]:
        for t in tokens:
            page = wanted[request.window_row[t // 32]]
            page[:, t % 32, :64], page[:, t % 32, 64:] = request.key[t], request.value[t]
    assert raw(builder.cache.window_pages).equal(raw(wanted))


@pytest.mark.parametrize("archive_format", known_formats(), ids=lambda one: one.name)
@pytest.mark.parametrize("archive_block", [32, 64, 96])
def test_compact_writes_its_own_slots_only(archive_block, archive_format):
    window = Window(32, 64)
    builder = CacheBuilder((32, 0, 48), 64, 2, window, archive_block, archive_format=archive_format)
    archive_block = builder.cache.layout.archive_block  # more, where granules go in pairs
    a, b, c = builder.add(10, 300), builder.add(260, 300), builder.add(150, 300)
    builder.run(builder.step([(a, 127), (b, 100), (c, 100)]), reference)
    step = builder.step([(a, 34), (b, 160), (c, 49)], padded_rows=1)
    reference.store(step.key, step.value, builder.cache, step.batch)
    window_pages, wanted = raw(builder.cache.window_pages), raw(builder.cache.archive_pages)
    reference.compact(builder.cache, step.batch)
    assert raw(builder.cache.window_pages).equal(window_pages)
    # a moves from 127 to 161 tokens; b completes its prompt, and c does not.
    for request, first, end in [(a, 32, 96), (b, 32, 192)]:
        block_end = -(-end // archive_block) * archive_block
        empty = [*range(first // archive_block * archive_block, first), *range(end, block_end)]
        for page, positions, content in [
            *builder.archive_bytes(request, range(first, end)),
            *builder.archive_bytes(request, empty, empty=True),
        ]:
            wanted[page, positions] = content
    assert raw(builder.cache.archive_pages).equal(wanted)


def test_a_step_without_requests_does_nothing():
    """Dummy runs of vLLM: rows without queries, slots that are padding."""
    builder = CacheBuilder((32, 0), 64, 2, Window(32, 64))
    request = builder.add(10, 10)
    step = builder.step([(request, 10)], padded_rows=3, padded_tokens=6)
    builder.run(step, reference)
    pools = raw(builder.cache.window_pages), raw(builder.cache.archive_pages)
    empty = type(step.batch)(
        query_start_loc=torch.zeros(4, dtype=torch.int32),
        query_start_loc_cpu=torch.zeros(4, dtype=torch.int32),
        seq_lens=torch.zeros(3, dtype=torch.int32),
        exact_until=torch.zeros(3, dtype=torch.int32),
        window_table=torch.zeros(3, 4, dtype=torch.int32),
        archive_table=torch.zeros(3, 4, dtype=torch.int32),
        slots=torch.full((6,), -1),
        in_prompt=torch.empty(0, dtype=torch.bool),
        max_query_len=0,
        max_seq_len=0,
    )
    output = torch.full_like(step.query, 7.0)
    reference.store(step.key, step.value, builder.cache, empty)
    reference.compact(builder.cache, empty)
    reference.attend(step.query, output, builder.cache, empty, builder.scale)
    assert (output == 7).all()
    assert raw(builder.cache.window_pages).equal(pools[0])
    assert raw(builder.cache.archive_pages).equal(pools[1])
