"""Far tokens that are chosen in several ways, beside the definition and full attention."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from archive_definition import PACKED
from baselines.far_tokens import Coded, FarTokens, unrounded
from baselines.selected_reading import ALL, EVERYTHING, WAYS, Choice, SelectedReading
from byte_tokenizer import copy_with_bytes
from mask_samples import MODEL, coded_mask, geometry_of, random_mask, statistics_of
from oracle import Oracle
from real import selection_study
from real.questions import Question, save_questions
from real.selection_cells import Simulated
from real.selection_study import OF_ANSWERS, OF_TEXTS, SAME, WHAT, _earlier, choices_of
from real.selection_table import rows_of
from tiny_models import load_tiny

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.selection import Selection
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.file import save_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.offline.context import Context, read_prompt
from vllm_leank.offline.prompts import Sample
from vllm_leank.offline.served_archive import ServedArchive
from vllm_leank.offline.simulate import SimulatedArchive

WINDOW = Window(32, 64)
FEW = Selection(share=1 << 14, least=1)
CHOICES = {ALL: Choice(ALL)} | {way: Choice(way, FEW) for way in WAYS}
PROMPT = 500


@pytest.fixture(scope="module")
def folder(tiny_llama):
    """The first two layers read all far tokens, so there are two more."""
    return tiny_llama(layers=4)


@pytest.fixture(scope="module")
def model(folder):
    return load_tiny(folder).eval()


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(512, (PROMPT + 50,), generator=generator).tolist()


def oracle_of(model, selection, mask):
    found = PACKED
    return Oracle(model, mask, *(32, 64), archive_format=found, selection=selection)


def simulated(model, stores, choices=CHOICES):
    return Simulated(model, WINDOW, stores, choices)


def test_choices_by_the_lead_are_those_of_the_definition(folder, model, tokens):
    """The boundary moves among the answer's tokens."""
    mask = coded_mask(folder)
    found = {}

    def keep(module, args, output):
        found["logits"] = output.logits

    handle = model.register_forward_hook(keep)
    study = simulated(model, {"": Coded(mask)}, {"": Choice("lead", FEW)})
    study.judge(Sample(tokens[:PROMPT], tokens[PROMPT:]))
    handle.remove()

    def error(selection):
        expected = oracle_of(folder, selection, mask).logits(tokens, exact_until=PROMPT)[PROMPT:]
        return (found["logits"][0] - expected).square().mean().sqrt()

    assert error(FEW) < 1e-4
    assert error(None) > 0.02


def test_answers_are_those_of_the_definition(folder, model, tokens):
    mask = coded_mask(folder)
    prompt = tokens[:PROMPT]
    study = simulated(model, {"bf16": unrounded, "codes": Coded(mask)})
    answers = study.answer(prompt, 12, stop=[-1])
    assert answers["codes, lead"] == oracle_of(folder, FEW, mask).greedy(prompt, 12)[0]
    assert answers["codes, all"] == oracle_of(folder, None, mask).greedy(prompt, 12)[0]
    ids = torch.tensor([prompt])
    dense = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    assert answers["bf16, all"] == dense[0, PROMPT:].tolist()
    stop = answers["bf16, all"][5]
    ended = study.answer(prompt, 12, stop=[stop])["bf16, all"]
    assert ended == answers["bf16, all"][: answers["bf16, all"].index(stop)]
    with pytest.raises(UserError, match="larger --recent"):
        study.answer(prompt, 65, stop=[])


def test_exact_choices_find_the_most(folder, model, tokens):
    study = simulated(model, {"bf16": unrounded, "codes": Coded(coded_mask(folder))})
    rows = study.judge(Sample(tokens[:PROMPT], tokens[PROMPT:]))
    for stored in ("bf16", "codes"):
        whole, *ways = (rows[f"{stored}, {choice}"] for choice in CHOICES)
        assert (whole["found"], whole["lost"]) == (1, 0)
        lead, exact, random = (row["found"] for row in ways)
        assert exact > lead + 0.02 > random + 0.02
        # Random attention is spread: what is found by chance is about what is read.
        assert random == pytest.approx(2 / 7, abs=0.06)
        assert ways[1]["lost"] < ways[0]["lost"] < ways[2]["lost"]
    assert rows["bf16, all"]["kl"] < 1e-5 * 50
    assert rows["bf16, all"]["kl"] < rows["bf16, exact"]["kl"] < rows["bf16, random"]["kl"]


def test_all_that_can_be_chosen_is_no_choice_bit_for_bit(folder, model, tokens):
    mask = coded_mask(folder)
    geometry = Geometry.from_hf_config(model.config)
    context = Context(geometry)
    read_prompt(model, context, tokens[:PROMPT], PROMPT)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 40, 64, generator=generator) for heads in (4, 2, 2))
    far = FarTokens(context, 32, Coded(mask))

    def output(choice):
        hook = SelectedReading(context, WINDOW, far, [choice])
        return hook(3, query, key, value, None, None, None)

    whole = output(Choice(ALL))
    for way in WAYS:
        assert torch.equal(output(Choice(way, replace(EVERYTHING, least=1))), whole)
        assert not torch.equal(output(Choice(way, FEW)), whole)
    keys, values = (
        torch.cat((old, new), 2) for old, new in ((context.key(3), key), (context.value(3), value))
    )
    archive = ServedArchive(mask)
    expected = SimulatedArchive(WINDOW, archive, archive.blind)
    torch.testing.assert_close(
        whole, expected(3, query, keys, values, None, None, None), atol=2e-5, rtol=1e-4
    )


def test_masks_without_a_lead_are_refused(folder):
    geometry = geometry_of(folder)
    v_bits = np.full(geometry.shape, 2, np.uint8)
    k_bits = v_bits.copy()
    k_bits[1, 0] = 0
    statistics = statistics_of(geometry.shape)
    mask = Mask.from_bits(
        k_bits, v_bits, geometry, model=MODEL, provenance={"method": "even"}, statistics=statistics
    )
    with pytest.raises(UserError, match="needs bits for K in all heads"):
        Coded(mask)


def test_whole_channels_are_chosen_by_their_widest_chunk(folder, model, tokens):
    mask = random_mask(folder, [48])
    study = simulated(model, {"": Coded(mask)}, {"": Choice("lead", FEW)})
    row = study.judge(Sample(tokens[:PROMPT], tokens[PROMPT:]))[", "]
    assert 2 / 7 < row["found"] < 1


@pytest.mark.parametrize(("shares", "least"), [([0.1], 100), ([0.1], 0), ([0.0], 256), ([2], 256)])
def test_other_shares_are_refused(shares, least):
    with pytest.raises(UserError, match=r"--least|--shares"):
        choices_of(shares, least)


def test_shares_are_those_of_engines():
    found = choices_of([0.1, 1.0], 2048)
    assert found["exact 0.1"].selection == Selection.of(0.1)
    assert found["exact 1"].selection.count(500) == 500
    assert list(found)[:3] == ["all", "lead 0.1", "exact 0.1"]


def results(**changed):
    """Of a study that has found nothing yet."""
    same = dict.fromkeys((*SAME, *OF_ANSWERS, *OF_TEXTS), 0) | {
        "what": WHAT,
        "questions_sha256": "a",
    }
    return same | {"texts": [], "answers": []} | changed


def test_a_stopped_run_goes_on_and_no_other(tmp_path):
    path = tmp_path / "selection.json"
    assert _earlier(path, results()) == results()
    for content in ('{"model": 1', "{}"):
        path.write_text(content)
        with pytest.raises(UserError, match="no results of this study"):
            _earlier(path, results())
    path.write_text(json.dumps(results(texts=[1])))
    found = _earlier(path, results(questions_sha256="b"))
    assert (found["questions_sha256"], found["texts"]) == ("b", [1])
    with pytest.raises(UserError, match="made with another least"):
        _earlier(path, results(least=256))
    with pytest.raises(UserError, match="made with another judged"):
        _earlier(path, results(judged=4))
    path.write_text(json.dumps(results(texts=[1], judged=4)))
    assert _earlier(path, results(judged=0, unseen=2))["judged"] == 4  # only asks
    path.write_text(json.dumps(results(answers=[1])))
    assert _earlier(path, results(questions_sha256=None))["questions_sha256"] == "a"
    with pytest.raises(UserError, match="made with another questions_sha256"):
        _earlier(path, results(questions_sha256="b"))


def test_rows_are_means_over_tokens_and_questions():
    def text(length, group, kl):
        row = {"kl": kl, "agree": 3, "found": 0.5, "lost": 0.1}
        return {"length": length, "group": group, "tokens": 4, "rows": {"a": row}}

    texts = [text(8, "kinds seen", 1.0), text(8, "kinds seen", 3.0), text(8, "kinds unseen", 8.0)]
    asked = [
        {"task": task, "length": length, "rows": {"a": score}}
        for task, length, score in (("b", 8, 1.0), ("c", 8, 0.5), ("b", 16, 0.0))
    ]
    (row,) = rows_of(results(texts=[*texts, text(16, "kinds seen", 2.0)], answers=asked)).values()
    assert row["lengths"]["8"]["kinds seen"]["value"] == 0.5
    assert row["lengths"]["8"]["kinds unseen"] == {"value": 2.0, "low": None, "high": None}
    assert row["lengths"]["8"]["top1"] == 0.75
    assert "kinds unseen" not in row["lengths"]["16"]
    assert {name: one["value"] for name, one in row["points"].items()} == {
        "all": 50, "8": 75, "16": 0
    }  # fmt: skip


def test_the_study_writes_what_it_finds_and_goes_on(folder, tmp_path, monkeypatch, capsys):
    model, out = copy_with_bytes(folder, tmp_path / "model"), tmp_path / "out.json"
    save_mask(coded_mask(folder), tmp_path / "codes.yaml")
    questions = [Question("a", 600, "x" * 500, ("x",), 3), Question("b", 600, "y" * 480, ("y",), 3)]
    save_questions(questions, tmp_path / "questions.gz")

    def study(*options):
        command = [
            *("study", "--model", model, "--masks", tmp_path / "codes.yaml", "--out", out),
            *("--lengths", 700, "--judged", 1, "--unseen", 0, "--shares", 0.5, "--least", 256),
            *("--sink", 32, "--recent", 64, "--dtype", "float32", *options),
        ]
        monkeypatch.setattr("sys.argv", list(map(str, command)))
        selection_study.main()
        assert "codes, exact 0.5" in capsys.readouterr().out
        return json.loads(out.read_text())

    texts = study()
    assert [one["kind"] for one in texts["texts"]] == ["questions"]
    asked = study("--questions", tmp_path / "questions.gz", "--answers", 1)
    assert asked["texts"] == texts["texts"]
    assert [(one["task"], one["number"]) for one in asked["answers"]] == [("a", 0), ("b", 0)]
    row = asked["rows"]["codes, lead 0.5"]
    assert row["points"]["all"]["questions"] == 2
    assert 0.5 < row["lengths"]["700"]["found"] < 1
    with pytest.raises(SystemExit, match="another least"):
        study("--least", 320)
    with pytest.raises(SystemExit, match="another bf16"):
        study("--no-bf16")
    with pytest.raises(SystemExit, match="another judged"):
        study("--judged", 2)
