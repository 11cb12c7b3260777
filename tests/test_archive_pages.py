"""What compaction leaves in archive pages: tokens, zeros where there are none, and scales."""

import pytest
import torch
from archive_definition import (
    PACKED,
    archive_of,
    codes_of,
    field_bytes,
    numbers_of,
    token_scale,
)
from cache_builder import CacheBuilder
from format_samples import head_for
from mask_samples import coded_mask
from oracle import heads_of
from vllm_leank.kernels import reference
from vllm_leank.kernels.codecs import codec_of

from vllm_leank.core.formats import NATIVE, known_formats
from vllm_leank.core.window import Window


@pytest.mark.parametrize("archive_format", known_formats(), ids=lambda one: one.name)
@pytest.mark.parametrize(
    ("window", "archive_block"),
    [
        (Window(0, 32), 128),
        pytest.param(Window(32, 64), 32, marks=pytest.mark.long),
        pytest.param(Window(64, 100), 64, marks=pytest.mark.long),
        (Window(128, 64), 96),  # the page of the sink's last tokens is not the first page
    ],
    ids=str,
)
def test_pages_hold_tokens_and_zeros_for_the_rest(window, archive_block, archive_format):
    """V of every slot of a page can be read, however the tokens came."""
    builder = CacheBuilder(
        (48, 0, 112), 128, 1, window, archive_block, torch.bfloat16, archive_format
    )
    archive_block = builder.cache.layout.archive_block
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


@pytest.mark.parametrize("archive_format", known_formats(), ids=lambda one: one.name)
@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 100])
@pytest.mark.parametrize("kept", [0, 48])
def test_rounding_keeps_shapes_and_goes_by_granules(archive_format, kept, tokens):
    codec, generator = codec_of(archive_format), torch.Generator().manual_seed(tokens)
    head = head_for(archive_format, kept, 128)
    key, value = torch.randn(2, tokens, 128, generator=generator)
    rounded = codec.round(key, value, head)
    assert [(part.shape, part.dtype) for part in rounded] == [
        (key.shape, torch.float32),
        (value.shape, torch.float32),
    ]
    whole = tokens // 32 * 32
    for part, again in zip(rounded, codec.round(key[:whole], value[:whole], head), strict=True):
        assert part[:whole].equal(again)
    if codec.whole_channels:
        zeros = codec.round(torch.zeros(tokens, 128), torch.zeros(tokens, 128), head)
        assert not any(part.any() for part in zeros)


def test_the_native_archive_does_not_round():
    key, value = torch.randn(2, 40, 64).to(torch.bfloat16)
    rounded = codec_of(NATIVE).round(key, value, head_for(NATIVE, 64, 64))
    assert rounded[0].equal(key.float())
    assert rounded[1].equal(value.float())


def test_a_packed_archive_gives_back_what_its_definition_says(tiny_llama_dir):
    mask = coded_mask(tiny_llama_dir)
    read_back, codec = archive_of(mask), codec_of(PACKED)
    key, value = torch.randn(2, 70, 64, generator=torch.Generator().manual_seed(1))
    for layer, heads in heads_of(mask, range(len(mask.keep))).items():
        for index, head in enumerate(heads):
            expected = read_back(layer, index, key, value)
            for found, part in zip(codec.round(key, value, head), expected, strict=True):
                torch.testing.assert_close(found.double(), part, rtol=1e-6, atol=1e-6)


def test_bytes_of_a_packed_archive_are_those_of_its_definition(tiny_llama_dir):
    mask = coded_mask(tiny_llama_dir)
    key, value = torch.randn(2, 2, 32, 64, generator=torch.Generator().manual_seed(2))
    for layer, heads in heads_of(mask, range(len(mask.keep))).items():
        for index, head in enumerate(heads):
            stored = codec_of(PACKED).encode(key, value, head)
            of_token = token_scale(value.flatten(0, 1), *numbers_of(mask, "v", layer, index))
            assert stored.side.view(torch.float16).flatten().equal(of_token[:, 0])
            for part, given, kind, scale in (
                (stored.key, key, "k", None),
                (stored.value, value, "v", of_token),
            ):
                bits, mean, of_channel = numbers_of(mask, kind, layer, index)
                codes = codes_of(given.flatten(0, 1), bits, mean, of_channel, scale)
                fields = [field_bytes(codes, bits, one) for one in (8, 4, 2)]
                assert part.flatten(0, 1).equal(torch.cat(fields, dim=1))
