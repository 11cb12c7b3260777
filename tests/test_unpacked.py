"""Far tokens that are unpacked once for many queries, and what these find in them."""

from dataclasses import replace

import pytest
import torch
from archive_definition import CODED, PACKED
from cache_builder import CacheBuilder, relative_rms
from flash_stand_in import flash_attention
from vllm_leank.kernels import launch, reference, scratch, unpack
from vllm_leank.kernels.pieces import share_out
from vllm_leank.kernels.scratch import Regions, Scratch, needs_scratch

from vllm_leank.core.formats import NATIVE
from vllm_leank.core.pages import CacheLayout
from vllm_leank.core.profile import Profile
from vllm_leank.core.window import GRANULE, Window
from vllm_leank.serving import flash
from vllm_leank.serving.step import attend_layer

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
gpu = pytest.mark.gpu

FP16, BF16 = (torch.float16, 6e-4), (torch.bfloat16, 4e-3)
"""K and V of far tokens are rounded to the model's dtype, after their codes were, and what is found
in them is once more.
"""

HEADS_OF_96 = Profile(k2=64, v4=32), Profile(), Profile(k8=64, k4=32, v8=32)


def build(heads, head_dim, group, window, block, dtype=torch.float16, tokens=None, **options):
    """A builder whose cache has a scratch of so many tokens, all NaN."""
    builder = CacheBuilder(
        heads, head_dim, group, window, block, dtype, PACKED, device=DEVICE, **options
    )
    room = Scratch.allocate(
        builder.cache.layout, len(heads) * group, 1 << 13, 1 << 12, dtype, torch.device(DEVICE)
    )
    if tokens:
        results = room.pages.new_empty((1 << 12, len(heads) * group, head_dim))
        room = replace(room, pages=room.pages[:, :, :tokens].clone(), results=results)
        results.fill_(float("nan"))
    room.pages.fill_(float("nan"))
    builder.cache = replace(builder.cache, scratch=room)
    return builder


def decoded(cache, batch, head, granules):
    """K and V of a head's granules `(table row, slot)`, fp32 `[tokens, head_dim]`."""
    channels = cache.heads[head]
    stored = cache.head_pages[head].read(*reference._places(cache, batch, granules))
    both = cache.codec.decode(stored, channels)
    return [
        one.complete(part).flatten(0, 1)
        for one, part in zip((channels.k, channels.v), both, strict=True)
    ]


@pytest.mark.parametrize(
    ("heads", "head_dim", "window", "block", "page"),
    [
        (CODED[64], 64, Window(32, 64, exact=False), 128, 48),
        ((*CODED[128], Profile(k4=64, v2=64)), 128, Window(0, 32, exact=False), 256, 176),
        (CODED[256], 256, Window(64, 100, exact=False), 128, 80),
        (HEADS_OF_96, 96, Window(96, 32, exact=False), 128, 16),
    ],
)
def test_what_is_unpacked_is_what_the_reference_decodes(heads, head_dim, window, block, page):
    """Bit by bit, in parts and as a whole; zeros to the end of the last page, and no more."""
    builder = build(heads, head_dim, 1, window, block)
    requests = [builder.add(0, length) for length in (360, 90, 33)]
    for request in requests:
        builder.run(builder.step([(request, len(request) - 1)]), reference)
    step = builder.step([(request, 1) for request in requests])
    builder.cache = cache = replace(
        builder.cache, scratch=replace(builder.cache.scratch, page=page)
    )
    for regions, first in ((Regions(3, 5 * page), 0), (Regions(3, 5 * page), 5 * page)):
        pages = cache.scratch.pages
        pages.fill_(float("nan"))
        unpack.unpack(cache, step.batch, regions, first)
        for i, request in enumerate(requests):
            region = pages[:, :, i * regions.tokens : (i + 1) * regions.tokens]
            begin = window.sink + first
            end = min(window.boundary(len(request)), begin + regions.tokens)
            count = max(end - begin, 0)
            filled = -(-count // page) * page
            assert region[:, :, filled:].isnan().all()
            for head, profile in enumerate(heads):
                if not profile.stores:
                    assert region[:, head].isnan().all()
                    continue
                assert not region[:, head, count:filled].any()
                if count:
                    far = range(window.sink, window.boundary(len(request)), GRANULE)
                    expected = decoded(cache, step.batch, head, [(i, slot) for slot in far])
                    for found, part in zip(region[:, head, :count], expected, strict=True):
                        assert torch.equal(found, part[first : first + count].half())


@pytest.fixture
def page_of_48(monkeypatch):
    """Short pages of the scratch."""
    monkeypatch.setattr(scratch, "PAGE_TOKENS", {64: 48})


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of few queries, which read few far tokens."""
    monkeypatch.setattr(flash, "UNPACKED_TOKENS", 32)
    monkeypatch.setattr(launch, "PIECE_QUERIES", 32)


def attend(builder, step):
    """The far tokens' way, whatever the step's queries."""
    output = torch.full_like(step.query, float("nan"))
    reference.store(step.key, step.value, builder.cache, step.batch)
    reference.compact(builder.cache, step.batch)
    flash.attend_pruned(step.query, output, builder.cache, step.batch, builder.scale)
    return output[: len(step.expected)]


def parts_of(builder, step):
    """How many parts of requests and of contexts a step is done in."""
    cache, batch = builder.cache, step.batch
    far = cache.window.boundary(batch.max_seq_len) - cache.window.sink
    requests, tokens = cache.scratch.regions(batch.num_reqs, far)
    return len(share_out(batch, requests)), -(-far // tokens)


@pytest.mark.skipif(GPU, reason="FlashAttention itself is tested here")
@pytest.mark.parametrize(
    ("heads", "group", "window", "tokens", "sinks", "parts", "version"),
    [
        (CODED[64][1:3], 2, Window(32, 32, exact=False), 384, False, (1, 1), 2),
        (CODED[64][:1], 3, Window(0, 32, exact=False), 96, True, (3, 2), 2),
        (CODED[64][:1], 1, Window(0, 32, exact=False), 96, True, (3, 2), 3),
    ],
)
@pytest.mark.usefixtures("short_pieces", "page_of_48")
def test_queries_read_what_was_unpacked_and_the_rest(
    heads, group, window, tokens, sinks, parts, version, monkeypatch
):
    """Several requests at once, with a blind head, and one by one, in parts."""
    monkeypatch.setattr(flash, "_flash_attention", lambda: (flash_attention, version))
    builder = build(heads, 64, group, window, 128, tokens=tokens, sinks=sinks)
    requests = [builder.add(0, length) for length in (180, 90, 70)]
    for request, computed in zip(requests, (100, 20, 0), strict=True):
        if computed:
            builder.run(builder.step([(request, computed)]), reference)
    step = builder.step([(one, len(one) - one.computed) for one in requests], 1, 2)
    assert parts_of(builder, step) == parts
    output = attend(builder, step)
    assert relative_rms(output, step.expected) < FP16[1]


@gpu
@pytest.mark.parametrize(
    ("head_dim", "group", "dtypes", "block"),
    [
        (64, 8, BF16, 128),
        (96, 4, FP16, 128),
        (128, 1, BF16, 256),
        (128, 4, BF16, 128),
        (128, 7, FP16, 256),
        (128, 16, BF16, 128),
        (256, 2, BF16, 128),
    ],
)
@pytest.mark.parametrize("parts", [None, (3, 3)], ids=["at-once", "in-parts"])
@pytest.mark.parametrize("sinks", [False, True], ids=["no-sinks", "sinks"])
def test_a_step_as_it_is_served(head_dim, group, dtypes, block, parts, sinks, monkeypatch):
    """By FlashAttention: some requests that go on, one that begins, and one that is decoded."""
    monkeypatch.setattr(flash, "UNPACKED_TOKENS", 256)
    (dtype, tolerance), window = dtypes, Window(32, 64, exact=False)
    lengths, computed = (300, 1100, 900, 640), (299, 500, 830, 0)
    far = window.boundary(max(lengths)) - window.sink
    page = scratch.PAGE_TOKENS[head_dim]
    builder = build(
        (CODED | {96: HEADS_OF_96})[head_dim], head_dim, group, window, block, dtype,
        tokens=parts and -(-far // (parts[1] * page)) * page, sinks=sinks, num_blocks=400,
    )  # fmt: skip
    requests = [builder.add(0, length) for length in lengths]
    for request, tokens in zip(requests, computed, strict=True):
        if tokens:
            builder.run(builder.step([(request, tokens)]), reference)
    step = builder.step([(one, len(one) - one.computed) for one in requests], 1, 2)
    extends = replace(step, batch=step.batch.extends)
    assert extends.batch.num_reqs == 4  # one of them padding
    assert parts_of(builder, extends) == (parts or (1, 1))
    output = torch.full_like(step.query, float("nan"))
    new = step.query, step.key, step.value
    attend_layer(*new, output, builder.cache, step.batch, builder.scale)
    assert relative_rms(output[: len(step.expected)], step.expected) < tolerance
    assert builder.cache.scratch.pages.isfinite().any()


def test_few_queries_and_short_contexts_are_left_to_extend(monkeypatch):
    """Nothing is unpacked for them, nor anything allocated that could not be used."""
    found = []
    monkeypatch.setattr("vllm_leank.kernels.gpu.extend", lambda *args: found.append(args))
    builder = build(CODED[64][:1], 64, 1, Window(32, 64, exact=False), 128)
    for length, queries in ((4000, 63), (1000, 200)):
        batch = replace(builder.step([(builder.add(0, 200), queries)]).batch, max_seq_len=length)
        flash.attend_pruned(torch.empty(queries, 1, 64), None, builder.cache, batch, 1.0)
        assert found.pop()[3] is batch
    assert builder.cache.scratch.pages.isnan().all()


@pytest.mark.parametrize(
    ("archive_format", "heads", "window", "longest", "expected"),
    [
        (PACKED, CODED[64], Window(32, 64, exact=False), 4096, True),
        (PACKED, CODED[64], Window(32, 64), 4096, False),
        (PACKED, CODED[64], Window(32, 64, exact=False), 1000, False),
        (PACKED, (Profile(),), Window(32, 64, exact=False), 4096, False),
        (NATIVE, (Profile(k16=32, v16=64),), Window(32, 64, exact=False), 4096, False),
    ],
)
def test_which_layers_unpack(archive_format, heads, window, longest, expected):
    layout = CacheLayout(heads, 64, 2, 128, archive_format)
    assert needs_scratch(layout, window, longest) == expected


@pytest.mark.parametrize(
    ("kv_heads", "far", "tokens", "shares"),
    [
        (8, 30720, 30800, {(3, 30720): (1, 30800), (3, 10000): (3, 10032), (9, 900): (9, 1056)}),
        (8, 131072, 32736, {(2, 131072): (1, 32736), (2, 20000): (1, 20064)}),
        (32, 131072, 8096, {(2, 131072): (1, 8096), (5, 4000): (2, 4048)}),
    ],
)
def test_the_scratch_is_bounded_and_shared_out(kv_heads, far, tokens, shares):
    """It holds no more than a request needs, or 128 MiB; requests have room as a whole, or one has
    in parts.
    """
    layout = CacheLayout((CODED[128][0],) * kv_heads, 128, 2, 128, PACKED)
    device = torch.device("meta")
    room = Scratch.allocate(layout, 4 * kv_heads, far, 2048, torch.bfloat16, device)
    assert room.pages.shape == (2, kv_heads, tokens, 128)
    assert room.pages.nbytes <= 1 << 27
    assert room.key.shape == (tokens // 176, 176, kv_heads, 128)
    assert (room.results is None) == (far <= tokens)
    for (requests, longest), expected in shares.items():
        assert room.regions(requests, longest) == expected
