"""What compaction leaves in archive pages: tokens, zeros where there are none, and scales."""

import pytest
import torch
from cache_builder import FP8, CacheBuilder
from vllm_leank.kernels import reference
from vllm_leank.kernels.codecs import codec_of

from vllm_leank.core.formats import NATIVE
from vllm_leank.core.window import Window


@pytest.mark.parametrize("archive_format", [NATIVE, FP8], ids=str)
@pytest.mark.parametrize(
    ("window", "archive_block"),
    [
        (Window(0, 32), 128),
        (Window(32, 64), 32),
        (Window(64, 100), 64),
        (Window(128, 64), 96),  # the page of the sink's last tokens is not the first page
    ],
    ids=str,
)
def test_pages_hold_tokens_and_zeros_for_the_rest(window, archive_block, archive_format):
    """V of every slot of a page can be read, however the tokens came."""
    builder = CacheBuilder(
        (48, 0, 112), 128, 1, window, archive_block, torch.bfloat16, archive_format
    )
    request = builder.add(150, 500)
    for tokens in (149, 1, 100, 1, 30, 1, 32, 33, 1):
        builder.run(builder.step([(request, tokens)]), reference)
        first, end = window.sink, window.boundary(request.computed)
        if request.computed < request.prompt or first == end:
            continue
        archive = builder.cache.archive_pages.clone().view(torch.uint8)
        before = range(first // archive_block * archive_block, first)
        after = range(end, -(-end // archive_block) * archive_block)
        for page, positions, content in [
            *builder.archive_bytes(request, range(first, end)),
            *builder.archive_bytes(request, [*before, *after], empty=True),
        ]:
            assert archive[page, positions].equal(content)
    assert end >= 224


def quantize(values):
    """K `[n, 32, channels]` as an fp8 archive stores it, and the scales `[n]`."""
    stored = codec_of(FP8).encode(values, values)
    return stored.key, stored.side.view(torch.float32)[:, 0]


@pytest.mark.parametrize("magnitude", [0.0, 1e-42, 1e-30, 1.0, 1e30])
def test_quantized_numbers_are_within_half_a_step(magnitude):
    """e4m3 has 3 bits after the leading one, and 2 ** -9 is its smallest number."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 32, 112, generator=generator) * magnitude
    stored, scale = quantize(values)
    assert (stored.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert stored.float().isfinite().all()
    largest = values.abs().amax((1, 2))
    if magnitude in (1e-30, 1.0, 1e30):
        assert stored.float().abs().amax((1, 2)).tolist() == [448.0] * 3
        assert torch.allclose(scale * 448, largest)
    half_step = torch.maximum(values.abs() * 2**-4, scale[:, None, None] * 2**-10)
    error = (stored.float() * scale[:, None, None] - values).abs()
    assert (error <= half_step * (1 + 1e-5)).all()


def test_steps_have_scales_of_their_own():
    values = torch.tensor([1.0, 0.0, 448.0])[:, None, None].expand(3, 32, 16)
    stored, scale = quantize(values)
    assert scale.tolist() == pytest.approx([1 / 448, 1, 1])
    assert stored.float()[:, 0, 0].tolist() == [448, 0, 448]
