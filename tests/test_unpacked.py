"""Far tokens that are unpacked once for many queries, and what these find in them."""

from dataclasses import replace

import pytest
import torch
from archive_definition import CODED, PACKED
from cache_builder import CacheBuilder, relative_rms
from flash_stand_in import flash_attention
from vllm_leank.kernels import reference, unpack
from vllm_leank.kernels.scratch import Regions, Scratch, needs_scratch

from vllm_leank.core.formats import NATIVE
from vllm_leank.core.profile import Profile
from vllm_leank.core.window import Window
from vllm_leank.serving import flash
from vllm_leank.serving.step import attend_layer

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
gpu = pytest.mark.gpu

FP16, BF16 = (torch.float16, 1e-3), (torch.bfloat16, 8e-3)
"""K and V of far tokens are rounded to the model's dtype, after their codes were."""


def build(heads, head_dim, group, window, block, dtype=torch.float16, tokens=None, **options):
    """A builder whose cache has a scratch of so many tokens, all NaN."""
    builder = CacheBuilder(
        heads, head_dim, group, window, block, dtype, PACKED, device=DEVICE, **options
    )
    layout = builder.cache.layout
    scratch = Scratch.allocate(layout, len(heads) * group, 1 << 12, 1 << 12, dtype, torch.device(DEVICE))
    if tokens:
        scratch = replace(scratch, pages=scratch.pages[:, :, :tokens].clone())
    for part in (scratch.pages, scratch.results):
        if part is not None:
            part.fill_(float("nan"))
    builder.cache = replace(builder.cache, scratch=scratch)
    return builder


@pytest.mark.parametrize(
    ("heads", "head_dim", "window", "block", "page"),
    [
        (CODED[64], 64, Window(32, 64, exact=False), 128, 48),
        ((*CODED[128], Profile(k4=64, v2=64)), 128, Window(0, 32, exact=False), 256, 176),
        (CODED[256], 256, Window(64, 100, exact=False), 128, 80),
        ((Profile(k2=64, v4=32), Profile(k8=64, k4=32, v8=32)), 96, Window(96, 32, exact=False), 128, 16),
    ],
)
def test_what_is_unpacked_is_what_the_reference_decodes(heads, head_dim, window, block, page):
    """Bit by bit, in parts and as a whole; zeros to the end of the last page, and no more."""
    builder = build(heads, head_dim, 1, window, block)
    requests = [builder.add(0, length) for length in (420, 90, 33)]
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
                    expected = reference._archived_tokens(
                        cache, step.batch.archive_table[i], head, window.boundary(len(request))
                    )
                    for found, part in zip(region[:, head, :count], expected, strict=True):
                        assert torch.equal(found, part[first : first + count].half())


@pytest.fixture
def always(monkeypatch):
    """Far tokens are unpacked however few they are, and pieces are short."""
    monkeypatch.setattr(flash, "UNPACKED_TOKENS", 1)


@pytest.fixture(params=[2, 3])
def stand_in(request, monkeypatch, always):
    """Something that computes what FlashAttention does, where there is no GPU."""
    if not GPU:
        monkeypatch.setattr(flash, "_flash_attention", lambda: (flash_attention, request.param))


def attend(builder, step):
    output = torch.full_like(step.query, float("nan"))
    reference.store(step.key, step.value, builder.cache, step.batch)
    reference.compact(builder.cache, step.batch)
    flash.attend_pruned(step.query, output, builder.cache, step.batch, builder.scale)
    return output[: len(step.expected)]


def test_several_requests(stand_in):
    builder = build(CODED[64][:3], 64, 2, Window(32, 64, exact=False), 128)
    requests = [builder.add(0, length) for length in (480, 200, 60)]
    for chunks in ((150, 70, 20), (330, 130, 40)):
        step = builder.step(zip(requests, chunks, strict=True), padded_rows=1, padded_tokens=2)
        assert relative_rms(attend(builder, step), step.expected) < FP16[1]
