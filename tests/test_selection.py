"""Segments of far tokens are selected as defined: how many, by what, and what is read."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from archive_definition import CODED, PACKED, STEP
from cache_builder import CacheBuilder, relative_rms
from test_reference import FP32_ERROR, serve
from vllm_leank.kernels import gpu, reference
from vllm_leank.kernels.codecs import codec_of

from vllm_leank.core.options import OptionError, parse_options
from vllm_leank.core.selection import Selection
from vllm_leank.core.window import Window

SUMMARISED = PACKED.summarised()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def selecting(heads, head_dim, group, window, **options):
    """Requests of a layer of which queries read a quarter of the segments."""
    selection = Selection(share=1 << 14, least=1)
    return CacheBuilder(
        heads,
        head_dim,
        group,
        window,
        128,
        archive_format=SUMMARISED,
        selection=selection,
        **options,
    )


def few_steps(builder):
    """A prompt, decode with and without drafts, and an answer that is computed again."""
    long, short = builder.add(290, 340), builder.add(200, 260)
    yield builder.step([(long, 290), (short, 200)])
    yield builder.step([(long, 1), (short, 1)], padded_rows=1, padded_tokens=1)
    yield builder.step([(long, 3), (short, 17)], padded_tokens=2)
    yield builder.step([(long, 1), (short, 2)])


@pytest.mark.parametrize(
    ("pages", "segments", "count"),
    [(0.1, 2048, 205), (0.1, 40, 32), (0.1, 3, 3), (0.25, 200, 50), (1000, 100, 16), (256, 2, 2)],
)
def test_how_many_segments_are_read(pages, segments, count):
    selection = Selection.of(pages)
    assert selection.count(segments) == count
    assert selection.count(torch.tensor([segments, 0])).tolist() == [count, 0]


def test_a_share_of_all_selects_nothing():
    assert Selection.of(1.0) is None
    assert Selection.of(0.9).count(1 << 21) < 1 << 21


@pytest.mark.parametrize("pages", [0, 0.0, -0.1, 1.5, 1, 255, True, "0.1", float("nan")])
def test_other_options_are_refused(pages):
    with pytest.raises(OptionError, match="pages"):
        parse_options({"leank": {"pages": pages}})


@pytest.mark.parametrize("head_dim", CODED)
def test_summaries_are_means_and_variances_of_codes(head_dim):
    heads = tuple(head for head in CODED[head_dim] if head.kept)
    builder = CacheBuilder(heads, head_dim, 1, Window(0, 32), 128, archive_format=SUMMARISED)
    codec = codec_of(SUMMARISED)
    key = 2 * torch.randn(5, 32, head_dim, generator=torch.Generator().manual_seed(0))
    query = torch.randn(3, 2, head_dim, generator=torch.Generator().manual_seed(1))
    for head, channels in zip(heads, builder.cache.heads, strict=True):
        count = SUMMARISED.summary_bytes(head)
        stored = codec.encode(key, key, channels)
        found = codec.summarise(stored, channels, count).numpy()
        read, _ = codec.round(key.flatten(0, 1), key.flatten(0, 1), channels)
        bits = np.repeat([8, 4, 2], head.k[1:])[:count]
        first = channels.k.order[:count].numpy()
        scale = channels.k.factor[:count].numpy() / np.array([STEP[one] for one in bits])
        mean = channels.k.mean[:count].numpy()
        of_channels = (read.numpy()[:, first].reshape(5, 32, count) - mean) / scale
        # Halves of the last digit decide nothing: codes are compared up to one step there.
        mean, variance = of_channels.mean(1) / 0.25, of_channels.var(1) / 0.15
        assert np.abs((found & 15) - np.clip(mean + 7.5, 0, 15)).max() < 0.501
        assert np.abs((found >> 4) + 0.5 - np.clip(variance, 0.5, 15.5)).max() < 0.501
        # What is left out is the same for all granules.
        expected = query.numpy()[..., first] * scale
        expected = np.einsum("qgc,nc->qn", expected, 0.25 * (found & 15)) + np.einsum(
            "qgc,nc->qn", expected**2, 0.075 * (found >> 4)
        )
        score = codec.score(query, torch.from_numpy(found), channels).numpy()
        np.testing.assert_allclose(score, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "window",
    [
        Window(32, 64),
        pytest.param(Window(0, 32), marks=pytest.mark.long),
        pytest.param(Window(64, 100), marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.parametrize(("head_dim", "group"), [(64, 4), (128, 2), (256, 1)])
def test_queries_read_the_best_segments(head_dim, group, window):
    builder = selecting(CODED[head_dim], head_dim, group, window)
    left_out = 0
    for step in serve(builder):
        output = builder.run(step, reference)
        assert output.isfinite().all()
        assert relative_rms(output, step.expected) < 4 * FP32_ERROR
        whole = reference_of_all(builder, step)
        left_out += relative_rms(whole, step.expected) > 0.01
    assert left_out


def reference_of_all(builder, step):
    """What queries would read without selection."""
    output = torch.zeros_like(step.query)
    reference.attend(
        step.query, output, replace(builder.cache, selection=None), step.batch, builder.scale
    )
    return output[: len(step.expected)]


def attend(query, output, cache, batch, scale):
    """The kernels as a step on a GPU launches them; the reference stands in for FlashAttention."""
    if batch.num_decodes < batch.num_reqs:
        reference.attend(query, output, replace(cache, selection=None), batch.extends, scale)
        if batch.extends.replayed:
            gpu.decode_each(query, output, cache, batch.extends, scale)
    if batch.decodes.num_reqs:
        gpu.decode(query, output, cache, batch.decodes, scale)


KERNELS = SimpleNamespace(store=gpu.store, compact=gpu.compact, attend=attend)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    ("head_dim", "group", "window"),
    [(64, 4, Window(32, 64)), pytest.param(128, 2, Window(64, 40), marks=pytest.mark.long)],
    ids=str,
)
def test_kernels_read_the_best_segments(head_dim, group, window):
    heads = CODED[head_dim] if DEVICE == "cuda" else CODED[head_dim][:2]
    builder = selecting(heads, head_dim, group, window, dtype=torch.float16, device=DEVICE)
    for step in few_steps(builder):
        output = builder.run(step, KERNELS)
        assert output.isfinite().all()
        assert relative_rms(output, step.expected) < 6e-4


@pytest.mark.usefixtures("few_programs")
def test_kernels_write_the_summaries_of_the_reference():
    pages = []
    for kernels in (reference, KERNELS):
        builder = selecting(CODED[128], 128, 1, Window(32, 64), device=DEVICE)
        request = builder.add(200, 200)
        step = builder.step([(request, 200)])
        kernels.store(step.key, step.value, builder.cache, step.batch)
        kernels.compact(builder.cache, step.batch)
        pages.append(builder.cache.archive_pages)
    assert torch.equal(*pages)
