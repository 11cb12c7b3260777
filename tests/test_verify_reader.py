"""What `leank verify` measures of a prompt, against the oracle."""

import numpy as np
import pytest
import torch
from archive_definition import PACKED
from mask_samples import coded_mask, full_mask, random_mask, statistics_of
from oracle import Oracle, heads_of
from transformers import AutoModelForCausalLM
from vllm_leank.kernels.codecs import codec_of

from vllm_leank.core.formats import NATIVE
from vllm_leank.core.selection import Selection
from vllm_leank.core.window import Window
from vllm_leank.mask.mask import Mask
from vllm_leank.offline.attention_hook import hooked_attention
from vllm_leank.offline.context import AfterContext, Context, logits, read_prompt
from vllm_leank.offline.divergence import divergence
from vllm_leank.offline.prompts import Sample
from vllm_leank.offline.served_archive import ServedArchive
from vllm_leank.offline.simulate import SimulatedPruning
from vllm_leank.offline.verify.asking import ask_haystack
from vllm_leank.offline.verify.haystacks import Haystack, Question
from vllm_leank.offline.verify.memory import token_bytes
from vllm_leank.offline.verify.reader import Reader
from vllm_leank.offline.verify.texts import compare_sample, compare_text

WINDOW = Window(32, 64)
PROMPT = torch.randint(256, (230,), generator=torch.Generator().manual_seed(0)).tolist()
ANSWER = [7, 3, 250, 3, 9] * 8


@pytest.fixture(scope="module")
def model(tiny_llama_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir)


def compare(model, mask, answer, window=WINDOW, *, tokens=32, **options):
    reader = Reader(model, mask, window, **options)
    return compare_sample(reader, ("here", Sample(PROMPT, answer)), 0, tokens)


def oracle_kl(directory, mask, ids, until, **options):
    """KL after each token behind the prompt, `[T]`, and where most likely tokens are the same."""
    whole = np.ones(mask.geometry.shape, bool)
    dense = Oracle(directory, whole, 32, 64).logits(ids, len(ids))
    other = Oracle(directory, mask, 32, 64, **options).logits(ids, until)
    p, q = (one[len(PROMPT) :].log_softmax(-1) for one in (dense, other))
    return (p.exp() * (p - q)).sum(-1).numpy(), (p.argmax(-1) == q.argmax(-1)).numpy()


@pytest.mark.parametrize("answer", [ANSWER, []])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "pruned"])
def test_figures_are_those_of_the_oracle(model, tiny_llama_dir, answer, exact):
    mask = random_mask(tiny_llama_dir, [32, 0, 16, 64])
    window = Window(32, 64, exact)
    one = compare(model, mask, answer, window, tokens=5, chunk=100)
    full = Oracle(tiny_llama_dir, np.ones_like(mask.keep), 32, 64)
    written = answer or full.greedy(PROMPT, 5)[0]
    assert one.tokens == written
    until = window.exact_until(len(PROMPT))
    kl, agree = oracle_kl(tiny_llama_dir, mask, PROMPT + written, until)
    assert kl.sum() > 0.01
    np.testing.assert_allclose(one.found.kl, kl, rtol=2e-2, atol=1e-5)
    assert one.found.total == pytest.approx(kl.sum(), rel=1e-3)
    assert one.found.agree == agree.sum()
    assert (one.dense_right, one.leank_right) == ((False, False) if answer else (None, None))


@pytest.mark.parametrize("kind", ["codes", "whole channels"])
def test_the_best_far_tokens_alone_are_those_of_the_oracle(tiny_llama, kind):
    """The first two layers read all, so the model has four."""
    model_dir = tiny_llama(layers=4)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    codes = kind == "codes"
    mask = coded_mask(model_dir) if codes else random_mask(model_dir, [32, 64])
    ids = torch.randint(256, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    form = PACKED if codes else NATIVE

    def logits_with(selection):
        reader = Reader(model, mask, WINDOW, selection, chunk=100)
        reader.begin(len(ids))
        reader.read(ids[:660])
        oracle = Oracle(model_dir, mask, 32, 64, archive_format=form, selection=selection)
        return reader.served(ids[660:]), oracle.logits(ids, exact_until=660)[660:]

    found, expected = logits_with(Selection.of(256))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    everything, _ = logits_with(None)
    assert (everything - found).abs().max() > 0.02


def test_selecting_begins_with_the_first_far_tokens(tiny_llama):
    """The first tokens behind a short prompt see none, and so choose none."""
    model_dir = tiny_llama(layers=4)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    ids = PROMPT[:200]
    logits_of = []
    for selection in (None, Selection.of(256)):
        reader = Reader(model, coded_mask(model_dir), WINDOW, selection)
        reader.begin(len(ids))
        reader.read(ids[:100])
        logits_of.append(reader.served(ids[100:]))
    # So few far tokens are read all.
    torch.testing.assert_close(*logits_of)


def whole_mask(model_dir):
    """Whole channels, with means for those that are pruned."""
    keep = random_mask(model_dir, [32, 0, 16, 64])
    return Mask.from_bits(
        keep.k_bits,
        keep.v_bits,
        keep.geometry,
        model="whole",
        provenance={"method": "random"},
        statistics=statistics_of(keep.k_bits.shape),
    )


ARCHIVES = [(coded_mask, PACKED), (whole_mask, NATIVE)]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "pruned"])
@pytest.mark.parametrize(("make", "archive_format"), ARCHIVES)
def test_far_tokens_are_read_as_served(model, tiny_llama_dir, make, archive_format, exact):
    mask, window = make(tiny_llama_dir), Window(32, 64, exact)
    one = compare(model, mask, ANSWER, window, chunk=100)
    until = window.exact_until(len(PROMPT))
    kl, _ = oracle_kl(tiny_llama_dir, mask, PROMPT + ANSWER, until, archive_format=archive_format)
    assert one.found.total == pytest.approx(kl.sum(), rel=2e-3)
    assert one.found.total > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "archive_format"), ARCHIVES)
def test_an_archive_gives_back_the_bits_of_its_codec(tiny_llama_dir, make, archive_format, dtype):
    mask = make(tiny_llama_dir)
    archive = ServedArchive(mask)
    key, value = torch.randn(2, 2, 2, 96, 64).to(dtype)
    codec = codec_of(archive_format)
    for layer, heads in heads_of(mask, range(len(mask.keep))).items():
        given = archive(layer, 32, key, value)
        for index, head in enumerate(heads):
            assert archive.blind[layer, index] != head.profile.stores
            for row in range(2 * head.profile.stores):
                expected = codec.round(key[row, index], value[row, index], head)
                for part, found in zip(expected, given, strict=True):
                    assert found[row, index].equal(part)


def test_masks_of_whole_channels_give_the_figures_of_pruned_keys(model, tiny_llama_dir):
    mask = random_mask(tiny_llama_dir, [32, 0, 16, 64])
    found = compare(model, mask, ANSWER).found
    context, pruning = Context(mask.geometry), SimulatedPruning(WINDOW)
    with torch.inference_mode():
        read_prompt(model, context, PROMPT, 100)
        pair = []
        for keep in (np.ones_like(mask.keep), mask.keep):
            pruning.keep = torch.tensor(keep)
            with hooked_attention(model, AfterContext(context, pruning), context=context):
                pair.append(logits(model, context, ANSWER))
    before = divergence(*pair)
    np.testing.assert_allclose(found.kl, before.kl, rtol=1e-2, atol=1e-6)
    assert found.dense_top.tolist() == before.dense_top.tolist()
    assert found.other_top.tolist() == before.other_top.tolist()


def test_a_mask_that_keeps_everything_changes_nothing(model, tiny_llama_dir):
    one = compare(model, full_mask(tiny_llama_dir), [], tokens=4)
    assert (len(one.tokens), one.found.agree, one.kl) == (4, 4, 0)


def test_answers_are_right_when_greedy_decoding_would_write_them(model, tiny_llama_dir):
    mask = random_mask(tiny_llama_dir, [0])
    dense, _ = Oracle(tiny_llama_dir, np.ones_like(mask.keep), 32, 64).greedy(PROMPT, 6)
    pruned, _ = Oracle(tiny_llama_dir, mask.keep, 32, 64).greedy(PROMPT, 6)
    assert dense[0] == pruned[0]
    assert dense != pruned
    answers = [(dense, (True, False)), (pruned, (False, True)), (dense[:1], (True, True))]
    for answer, right in answers:
        one = compare(model, mask, answer)
        assert (one.dense_right, one.leank_right) == right
    # As questions about a context that is read once, they have the same answers.
    questions = [Question(PROMPT[200:], answer) for answer, _ in answers]
    found = ask_haystack(Reader(model, mask, WINDOW), Haystack("x", PROMPT[:200], questions), 0)
    for one, (_, right) in zip(found, answers, strict=True):
        assert (one.dense_right, one.leank_right) == right
        assert one.prompt_tokens == len(PROMPT)


def test_writing_stops_at_the_end(model, tiny_llama_dir):
    mask = full_mask(tiny_llama_dir)
    written, _ = Oracle(tiny_llama_dir, mask.keep, 32, 64).greedy(PROMPT, 6)
    model.generation_config.eos_token_id = [511, written[2]]
    try:
        one = compare(model, mask, [])
        assert one.tokens == written[: written.index(written[2]) + 1]
    finally:
        model.generation_config.eos_token_id = None


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "pruned"])
def test_a_text_read_once_gives_what_reading_to_each_length_gives(model, tiny_llama_dir, exact):
    mask, window = random_mask(tiny_llama_dir, [32, 0, 16, 64]), Window(32, 64, exact)
    text = torch.randint(256, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    reader = Reader(model, mask, window, chunk=90)
    for one in compare_text(reader, ("x", text), 0, (200, 260, 400)):
        end = one.prompt_tokens
        sample = Sample(text[:end], text[end : end + 64])
        alone = compare_sample(Reader(model, mask, window), ("x", sample), 0, 1)
        assert one.tokens == sample.answer
        assert one.found.total == pytest.approx(alone.found.total, rel=1e-4)
        assert one.found.total > 0.01


def test_one_layer_alone_is_a_mask_that_keeps_all_others(model, tiny_llama_dir):
    mask = random_mask(tiny_llama_dir, [32, 0, 0, 48])
    reader = Reader(model, mask, WINDOW)
    reader.begin(300)
    reader.read(PROMPT)
    losses = [found.total for found in reader.compare_layers(ANSWER)]
    assert len(losses) == 2
    for layer, loss in enumerate(losses):
        keep = np.ones_like(mask.keep)
        keep[layer] = mask.keep[layer]
        other = Mask.from_keep(keep, mask.geometry, model="x", provenance={"method": "x"}, align=16)
        assert loss == pytest.approx(compare(model, other, ANSWER).found.total, rel=1e-4)
        assert loss > 0.01


def test_one_layer_alone_reads_its_best_far_tokens(tiny_llama):
    """The first two layers read all of them."""
    model_dir = tiny_llama(layers=4)
    model, mask = AutoModelForCausalLM.from_pretrained(model_dir), random_mask(model_dir, [32, 64])
    ids = torch.randint(256, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    losses = []
    for selection in (None, Selection.of(256)):
        reader = Reader(model, mask, WINDOW, selection)
        reader.begin(len(ids))
        reader.read(ids[:660])
        losses.append([found.total for found in reader.compare_layers(ids[660:])])
    everything, best = losses
    assert best[:2] == everything[:2]
    assert all(abs(one - other) > 0.01 for one, other in zip(best[2:], everything[2:], strict=True))


def test_memory_of_a_token(model, tiny_llama_dir):
    """By hand: 2 layers of K and V of 2 x 64 in fp32, and work for one layer: 4 copies of them, and
    3 scores of 64 queries in 4 heads.
    """
    mask = full_mask(tiny_llama_dir)
    work = 4 * (4 * 256 + 3 * 64 * 4)
    assert token_bytes(Reader(model, mask, WINDOW)) == 2 * 256 * 4 + work
    assert token_bytes(Reader(model, mask, Window(32, 64, False))) == 2 * 2 * 256 * 4 + work
