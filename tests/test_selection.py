"""Segments of far tokens are selected as defined: how many, by what, and what is read."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from archive_definition import CODED, PACKED
from cache_builder import CacheBuilder, relative_rms
from test_reference import FP32_ERROR, serve
from vllm_leank.kernels import decode, decode_each, gpu, reference
from vllm_leank.kernels.reference_selection import select

from vllm_leank.core.formats import NATIVE
from vllm_leank.core.options import OptionError, parse_options
from vllm_leank.core.profile import Profile
from vllm_leank.core.selection import Selection
from vllm_leank.core.window import Window

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


WHOLE = tuple(Profile(k16=kept, v16=128 * (kept > 0)) for kept in (48, 0, 128))
"""Heads that keep channels whole."""


def selecting(heads, head_dim, group, window, archive_format=PACKED, **options):
    """Requests of a layer of which queries read a quarter of the segments."""
    selection = Selection(share=1 << 14, least=1)
    return CacheBuilder(
        heads,
        head_dim,
        group,
        window,
        128,
        archive_format=archive_format,
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
def test_the_lead_has_the_channels_with_most_bits(head_dim):
    """It is the first field of K, and each head that stores K has one."""
    for head in CODED[head_dim]:
        lead = PACKED.lead(head)
        assert (lead > 0) == (head.kept > 0)
        if lead:
            part = PACKED.head_part(head, 128, 2, 0)
            bits = np.repeat([16, 8, 4, 2], head.k)
            assert (bits[:lead] == bits[0]).all()
            assert not (bits[lead:] == bits[0]).any()
            assert part.k_chunks[0].width * 8 == bits[:lead].sum()


def test_the_lead_of_whole_channels_is_the_widest_chunk():
    for kept, lead in ((0, 0), (16, 16), (48, 32), (112, 64), (128, 128)):
        head = Profile(k16=kept, v16=128 * (kept > 0))
        assert NATIVE.lead(head) == lead
        if kept:
            assert NATIVE.head_part(head, 128, 2, 0).k_chunks[0].width == lead


def test_a_segment_is_as_good_as_its_best_token_for_one_of_the_heads():
    """Query heads are not added: one that has all its weight in one place finds it."""
    scores = torch.full((1, 2, 1, 8), -5.0)
    scores[0, 0, 0, :6] += torch.arange(6) / 10
    scores[0, 1, 0] = torch.tensor([0, 90, 0, 0, 0, 0, 95, 0])
    seen = torch.ones(1, 1, 8, dtype=torch.bool)
    found = select(scores, seen, 64, Selection(0, 2))
    # 95 - 95 and -4.5 + 4.5, though 90 is more than all others: it is 5 behind.
    assert found.view(4, 2)[:, 0].tolist() == [False, False, True, True]


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
    check_reference(selecting(CODED[head_dim], head_dim, group, window))


def test_queries_read_the_best_segments_of_whole_channels():
    check_reference(selecting(WHOLE, 128, 2, Window(32, 64), NATIVE))


def check_reference(builder):
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
        gpu.decode_requests(query, output, cache, batch.decodes, scale)


KERNELS = SimpleNamespace(store=gpu.store, compact=gpu.compact, attend=attend)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    ("head_dim", "group", "window"),
    [(64, 4, Window(32, 64)), pytest.param(128, 2, Window(64, 40), marks=pytest.mark.long)],
    ids=str,
)
def test_kernels_read_the_best_segments(head_dim, group, window):
    heads = CODED[head_dim] if DEVICE == "cuda" else CODED[head_dim][:2]
    check_kernels(selecting(heads, head_dim, group, window, dtype=torch.float16, device=DEVICE))


@pytest.mark.usefixtures("few_programs")
def test_many_requests_select_a_part_at_a_time(monkeypatch):
    """As each takes memory for scores of all segments. Here a part is one request, the last one is
    padding.
    """
    seen, chosen = [], decode.select
    monkeypatch.setattr(decode_each, "SELECTING_AT_ONCE", 1)
    monkeypatch.setattr(decode, "select", lambda *a: seen.append(len(a[0])) or chosen(*a))
    heads = CODED[64][:1]
    builder = selecting(heads, 64, 2, Window(32, 64), dtype=torch.float16, device=DEVICE)
    requests = builder.add(300, 302), builder.add(20, 250)
    step = builder.step([(one, len(one) - 1) for one in requests])
    reference.store(step.key, step.value, builder.cache, step.batch)
    reference.compact(builder.cache, step.batch)
    step = builder.step([(one, 1) for one in requests], padded_rows=1, padded_tokens=1)
    output = torch.full_like(step.query, float("nan"))
    gpu.update(step.key, step.value, builder.cache, step.batch)
    gpu.decode_requests(step.query, output, builder.cache, step.batch, builder.scale)
    assert seen == [1, 1, 1]
    assert relative_rms(output[:2], step.expected) < 6e-4
    assert (output[2] == 0).all()


@pytest.mark.long
@pytest.mark.usefixtures("few_programs")
def test_kernels_read_the_best_segments_of_whole_channels():
    check_kernels(
        selecting(WHOLE, 128, 2, Window(32, 64), NATIVE, dtype=torch.float16, device=DEVICE)
    )


def check_kernels(builder):
    for step in few_steps(builder):
        output = builder.run(step, KERNELS)
        assert output.isfinite().all()
        assert relative_rms(output, step.expected) < 6e-4
