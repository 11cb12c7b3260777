"""`leank verify`: its figures against the oracle, its verdicts, and what it refuses."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from mask_samples import coded_mask, full_mask, random_mask, statistics_of
from oracle import Oracle, heads_of
from recall.demo import MODEL
from recall.tasks import make_sample
from transformers import AutoModelForCausalLM
from vllm_leank.kernels.codecs import codec_of

from vllm_leank.core.formats import find_format
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.file import save_mask
from vllm_leank.mask.lookup import find_masks
from vllm_leank.mask.mask import Mask
from vllm_leank.offline.prompts import Sample
from vllm_leank.offline.served_archive import ServedArchive
from vllm_leank.offline.simulate import SimulatedPruning
from vllm_leank.offline.verify import (
    Comparison,
    Summary,
    Thresholds,
    Verifier,
    by_length,
)

WINDOW = Window(32, 64)
PROMPT = torch.randint(256, (230,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def model(tiny_llama_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir)


def compare(model, mask, answer, window=WINDOW, **options):
    verifier = Verifier(model, mask, window, **options)
    (comparison,) = verifier.compare([("here", Sample(PROMPT, answer))])
    return comparison


@pytest.mark.parametrize("answer", [[7, 3, 250, 3, 9] * 8, []])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "pruned"])
def test_figures_are_those_of_the_oracle(model, tiny_llama_dir, answer, exact):
    mask = random_mask(tiny_llama_dir, [32, 0, 16, 64])
    window = Window(32, 64, exact)
    found = compare(model, mask, answer, window, tokens=5, chunk=100)
    full = Oracle(tiny_llama_dir, np.ones_like(mask.keep), 32, 64)
    written = answer or full.greedy(PROMPT, 5)[0]
    dense = full.logits(PROMPT + written, len(PROMPT))[len(PROMPT) :].log_softmax(-1)
    exact_until = window.exact_until(len(PROMPT))
    pruned = Oracle(tiny_llama_dir, mask.keep, 32, 64).logits(PROMPT + written, exact_until)
    pruned = pruned[len(PROMPT) :].log_softmax(-1)
    kl = float((dense.exp() * (dense - pruned)).sum())
    assert kl > 0.01
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert found.positions == len(written)
    assert found.agree == int((dense.argmax(-1) == pruned.argmax(-1)).sum())
    assert (found.dense_right, found.leank_right) == ((False, False) if answer else (None, None))


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


ARCHIVES = [(coded_mask, "packed"), (whole_mask, "auto"), (whole_mask, "fp8")]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "pruned"])
@pytest.mark.parametrize(("make", "name"), ARCHIVES)
def test_far_tokens_are_read_as_served(model, tiny_llama_dir, make, name, exact):
    mask, window, answer = make(tiny_llama_dir), Window(32, 64, exact), [7, 3, 250, 3, 9] * 8
    found = compare(model, mask, answer, window, chunk=100, archive_dtype=name)
    ids, until = PROMPT + answer, window.exact_until(len(PROMPT))
    dense = Oracle(tiny_llama_dir, np.ones_like(mask.keep), 32, 64).logits(ids, len(PROMPT))
    served = Oracle(tiny_llama_dir, mask, 32, 64, archive_format=find_format(name))
    p, q = (one[len(PROMPT) :].log_softmax(-1) for one in (dense, served.logits(ids, until)))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=2e-3)
    assert found.kl > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "name"), ARCHIVES)
def test_an_archive_gives_back_the_bits_of_its_codec(tiny_llama_dir, make, name, dtype):
    mask = make(tiny_llama_dir)
    archive = ServedArchive(mask, name)
    key, value = torch.randn(2, 2, 2, 96, 64).to(dtype)
    codec = codec_of(find_format(name))
    for layer, heads in enumerate(heads_of(mask)):
        given = archive(layer, 32, key, value)
        for index, head in enumerate(heads):
            assert archive.blind[layer, index] != head.profile.stores
            for row in range(2 * head.profile.stores):
                expected = codec.round(key[row, index], value[row, index], head)
                for part, found in zip(expected, given, strict=True):
                    assert found[row, index].equal(part)


def test_masks_of_whole_channels_give_the_figures_of_pruned_keys(model, tiny_llama_dir):
    mask = random_mask(tiny_llama_dir, [32, 0, 16, 64])
    new = Verifier(model, mask, WINDOW)
    old = Verifier(model, mask, WINDOW)
    pruning = SimulatedPruning(WINDOW)
    keep = torch.tensor(mask.keep)

    def attend(layer, *args):
        old._hooked.add(layer)
        archive = old._simulated.archive
        masks = keep if archive is old._archive else torch.ones_like(keep)
        pruning.keep = None if archive is None else masks
        return pruning(layer, *args)

    old._attend = attend
    samples = [("here", Sample(PROMPT, [7, 3, 250, 3, 9] * 8))]
    (found,), (before,) = new.compare(samples), old.compare(samples)
    assert found.kl == pytest.approx(before.kl, rel=1e-4)
    assert (found.agree, found.positions) == (before.agree, before.positions)


def test_short_and_long_samples_are_told_apart():
    short, long, longest = (
        Comparison("a", n - 10, 10, 9, n / 1e4, None, None) for n in (50, 60, 100)
    )
    assert [(one.least, one.most) for one in by_length([long, short, longest])] == [
        (50, 50),
        (60, 100),
    ]
    assert by_length([long, short, longest])[1].summary == Summary.of([long, longest])
    assert len(by_length([long, longest])) == 1


def test_a_mask_that_keeps_everything_changes_nothing(model, tiny_llama_dir):
    found = compare(model, full_mask(tiny_llama_dir), [], tokens=4)
    assert (found.positions, found.agree, found.kl) == (4, 4, 0)


def test_answers_are_right_when_greedy_decoding_would_write_them(model, tiny_llama_dir):
    mask = random_mask(tiny_llama_dir, [0])
    dense, _ = Oracle(tiny_llama_dir, np.ones_like(mask.keep), 32, 64).greedy(PROMPT, 6)
    pruned, _ = Oracle(tiny_llama_dir, mask.keep, 32, 64).greedy(PROMPT, 6)
    assert dense[0] == pruned[0]
    assert dense != pruned
    for answer, right in (
        (dense, (True, False)),
        (pruned, (False, True)),
        (dense[:1], (True,) * 2),
    ):
        found = compare(model, mask, answer)
        assert (found.dense_right, found.leank_right) == right


def test_writing_stops_at_the_end(model, tiny_llama_dir):
    mask = full_mask(tiny_llama_dir)
    written, _ = Oracle(tiny_llama_dir, mask.keep, 32, 64).greedy(PROMPT, 6)
    model.generation_config.eos_token_id = [511, written[2]]
    try:
        assert compare(model, mask, []).positions == written.index(written[2]) + 1
    finally:
        model.generation_config.eos_token_id = None


def test_summaries_and_verdicts():
    asked = [
        Comparison("a", 100, 10, 10, 0.2, True, True),
        Comparison("a", 100, 10, 5, 1.8, True, False),
        Comparison("b", 100, 20, 20, 0.0, False, True),
        Comparison("b", 100, 10, 10, 0.0, None, None),
    ]
    summary = Summary.of(asked)
    assert summary == Summary(4, 50, 0.9, 0.04, 3, 2, 2, 0.5)
    assert Thresholds(0.9, 0.04, 0.5).judge(summary) == dict.fromkeys(
        ("top1", "kl", "answers"), True
    )
    assert not any(Thresholds(0.91, 0.03, 0.51).judge(summary).values())
    assert Thresholds(0, 1, 1).judge(Summary.of(asked[2:]))["answers"] is None
    for bad in ((1.1, 0, 0), (0, -1, 0), (0, math.nan, 0), (0, 0, 2)):
        with pytest.raises(UserError, match="must"):
            Thresholds(*bad)


@pytest.fixture(scope="module")
def with_tokenizer(tiny_llama_dir, tmp_path_factory):
    """A random model that reads text, with a mask of nothing and one of everything beside it."""
    directory = tmp_path_factory.mktemp("verify") / "tiny"
    shutil.copytree(tiny_llama_dir, directory)
    byte_tokenizer().save_pretrained(directory)
    save_mask(full_mask(directory), directory / "full.yaml")
    save_mask(random_mask(directory, [0]), directory / "none.yaml")
    return directory


ARGS = ("--needles", 2, "--max-tokens", 700, "--sink", 32, "--recent", 64, "--json")


def test_needles_come_with_the_command(leank, with_tokenizer):
    full, none = with_tokenizer / "full.yaml", with_tokenizer / "none.yaml"
    code, out, _ = leank("verify", with_tokenizer, "--mask", full, *ARGS)
    report = json.loads(out)
    assert code == 0
    assert report["pass"] is True
    assert (report["top1"], report["kl"], report["answers"]) == (1, 0, 2)
    assert report["window"] == {"sink": 32, "recent": 64}
    assert [one["source"] for one in report["each"]] == ["needle among keys", "four needles"]
    assert all(170 < one["prompt_tokens"] + one["positions"] <= 700 for one in report["each"])
    # A random model knows no answer.
    assert report["reached"] == {"top1": True, "kl": True, "answers": None}
    assert report["notes"] == ["answers: not judged, as dense attention gets none right either"]

    code, out, _ = leank("verify", with_tokenizer, "--mask", none, *ARGS)
    report = json.loads(out)
    assert code == 1
    assert report["pass"] is False
    assert report["kl"] > 0.1


@pytest.fixture
def recall_data(tmp_path):
    """Two questions with answers, one without, and a prompt that has no far tokens."""
    samples = [make_sample(task, 1024, 0) for task in ("multivalue", "tracking", "single")]
    lines = [{"prompt_token_ids": one.prompt_token_ids} for one in samples]
    for line, one in zip(lines[:2], samples, strict=False):
        line["answer_token_ids"] = one.answer_token_ids
    lines.append({"prompt": "what is bako ="})
    path = tmp_path / "recall.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def test_the_bundled_model_passes_with_its_mask_only(leank, recall_data, tmp_path):
    code, out, _ = leank("verify", MODEL, "--data", recall_data)
    assert code == 0
    for text in ("PASS", "2 of 2", "recall.jsonl: 1 prompts without", "needles were left out: the"):
        assert text in out
    assert "--data" not in out
    (shipped,) = find_masks(str(MODEL))
    keep = np.random.default_rng(0).permuted(shipped.keep, axis=-1)
    mask = Mask.from_keep(keep, shipped.geometry, model="random", provenance={"method": "random"})
    save_mask(mask, tmp_path / "random.yaml")
    code, out, _ = leank("verify", MODEL, "--data", recall_data, "--mask", tmp_path / "random.yaml")
    assert code == 1
    assert "FAIL" in out
    assert "2 of 2" in out


def test_a_tokenizer_of_other_words_needs_prompts_of_its_own(leank):
    code, _, err = leank("verify", MODEL)
    assert code == 2
    assert "needles were left out: the tokenizer of" in err
    assert err.endswith("; give prompts with far tokens by --data prompts.jsonl\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--min-top1", "1.5"], "--min-top1 is 1.5"),
        (["--needles", 0], "nothing to compare"),
        (["--max-tokens", 100, "--sink", 32, "--recent", 64], "they need 128"),
        (["--sink", 33], "sink is 33"),
        (["--data", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--dtype", "int4"], "dtype is int4"),
    ],
)
def test_what_cannot_be_done_is_refused(leank, with_tokenizer, args, message):
    code, _, err = leank("verify", with_tokenizer, "--mask", with_tokenizer / "full.yaml", *args)
    assert code == 2
    assert message in err


def test_without_a_tokenizer_needles_are_refused(leank, tiny_llama_dir, with_tokenizer):
    code, _, err = leank("verify", tiny_llama_dir, "--mask", with_tokenizer / "full.yaml")
    assert code == 2
    assert "cannot be loaded by transformers" in err


def test_answers_of_all_lengths_fit(recall_data):
    from vllm_leank.mask.checkpoint import Checkpoint
    from vllm_leank.offline.verify_samples import file_samples

    checkpoint = Checkpoint.open(str(MODEL))
    samples, short = file_samples(
        recall_data, checkpoint, WINDOW, max_samples=3, max_tokens=300, room=40
    )
    assert short == 0
    assert [len(one.prompt) + len(one.answer) for _, one in samples] == [300, 300, 260]
