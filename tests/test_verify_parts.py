"""`leank verify`: intervals, verdicts, plans, and who is asked what."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.offline.divergence import ROWS, Divergence, divergence
from vllm_leank.offline.intervals import Estimate, _student, ratio_estimate, share_estimate, wilson
from vllm_leank.offline.prompts import Sample
from vllm_leank.offline.verify.asking import ask_until
from vllm_leank.offline.verify.comparison import Comparison, Group
from vllm_leank.offline.verify.haystacks import KINDS, ROOM, haystack
from vllm_leank.offline.verify.pace import Pace
from vllm_leank.offline.verify.plan import Work, choose_plan, doublings
from vllm_leank.offline.verify.texts import far_samples
from vllm_leank.offline.verify.verdict import Answers, Check, Outcome, Thresholds, judge, outcome
from vllm_leank.offline.verify.words import remarks

WINDOW = Window(64, 256)


def comparison(kl, agree, right=(None, None), unit=0):
    tops = np.arange(len(kl))
    found = Divergence(np.array(kl), np.zeros(len(kl)), tops, np.where(tops < agree, tops, -1))
    return Comparison("a", unit, 100, [], list(range(len(kl))), found, *right)


def test_divergence_is_that_of_the_distributions():
    """In more rows than are compared at once."""
    generator = torch.Generator().manual_seed(0)
    dense, other = 2 * torch.randn(2, ROWS + 6, 30, generator=generator)
    found = divergence(dense, other)
    p, q = dense.double().softmax(-1), other.double().softmax(-1)
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).numpy(), rel=1e-5)
    assert found.variation == pytest.approx(((p - q).clamp(min=0)).sum(-1).numpy(), rel=1e-5)
    assert found.agree == int((p.argmax(-1) == q.argmax(-1)).sum())
    assert divergence(dense, dense).total == divergence(dense, dense).variation.max() == 0


def test_bootstrap_finds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    tries, hits = 100, 0
    for seed in range(tries):
        counts = rng.integers(20, 60, 30)
        kl = counts * rng.gamma(2, 0.01, 30)
        found = ratio_estimate(kl, counts, seed)
        assert found.low <= found.value <= found.high
        hits += found.low <= 0.02 <= found.high
    assert 0.88 <= hits / tries <= 0.98


def test_prompts_are_drawn_and_not_their_tokens():
    alike = Group.of("x", [comparison([0.1 * i] * 50, 50, unit=i) for i in range(6)])
    assert alike.kl.low < 0.1
    assert alike.kl.high > 0.4
    assert alike.kl.value == pytest.approx(0.25)
    # That all tokens agree is not sure.
    assert (alike.top1.value, alike.top1.low, alike.top1.high) == (1, *wilson(300, 300))
    # Of few contexts nothing tells how others would do.
    for contexts in (1, 4):
        few = Group.of("x", [comparison([0.1 * i] * 50, 50, unit=i % contexts) for i in range(8)])
        assert (few.samples, few.kl.low, few.kl.high) == (8, None, None)
        assert (few.top1.value, few.top1.low, few.top1.high) == (1, None, None)


@pytest.mark.parametrize(("n", "least"), [(6, 0.84), (12, 0.88), (24, 0.9)])
def test_intervals_of_few_samples_hold(n, least):
    """Of skewed ones, where percentiles as they are hold in 79%, 87% and 91% of all cases."""
    rng = np.random.default_rng(0)
    tries, hits = 400, 0
    for _ in range(tries):
        found = ratio_estimate(rng.lognormal(0, 0.7, n), [1.0] * n)
        hits += found.low <= np.exp(0.245) <= found.high
    assert hits / tries >= least


@pytest.mark.parametrize(("degrees", "point"), [(4, 2.776), (9, 2.262), (29, 2.045), (1599, 1.961)])
def test_students_points_are_those_of_tables(degrees, point):
    assert _student(degrees) == pytest.approx(point, abs=0.01)


def test_groups_count_every_token_alike():
    group = Group.of("x", [comparison([0.1, 0.2], 1), comparison([0.3] * 4, 4)])
    assert (group.samples, group.positions) == (2, 6)
    assert group.kl.value == pytest.approx(0.25)
    assert group.top1.value == pytest.approx(5 / 6)


def answers(dense, kept, wrong=3):
    right = [(True, i < kept) for i in range(dense)] + [(False, True)] * wrong
    return Answers.of([*(comparison([0.0], 1, one) for one in right), comparison([0.0], 1)])


def test_answers_count_where_dense_attention_is_right():
    found = answers(20, 18)
    assert (found.asked, found.dense_right, found.kept) == (23, 20, 18)
    assert found.share == share_estimate([18], [20])
    assert found.judged
    assert not answers(15, 15).judged
    none = answers(0, 0)
    assert (none.share, none.judged) == (None, False)


def test_answers_of_one_context_may_go_wrong_together():
    """Five contexts of eight questions: all that is lost is in one, or it is spread."""

    def lost(*of_each):
        return Answers.of(
            [
                comparison([0.0], 1, (True, question >= of_one), unit)
                for unit, of_one in enumerate(of_each)
                for question in range(8)
            ]
        ).share

    together, spread = lost(8, 0, 0, 0, 0), lost(2, 2, 2, 1, 1)
    assert together.value == spread.value == 32 / 40
    assert (spread.low, spread.high) == wilson(32, 40)
    assert together.low < 0.5 < spread.low < spread.high < together.high == 1


@pytest.mark.parametrize(
    ("dense", "kept", "kl", "expected"),
    [
        (16, 15, 0.04, Outcome.PASS),
        (16, 14, 0.04, Outcome.FAIL),
        (16, 16, 0.06, Outcome.FAIL),
        (15, 15, 0.04, Outcome.NOT_JUDGED),
        (0, 0, 0.04, Outcome.NOT_JUDGED),
        (15, 15, 0.06, Outcome.FAIL),
        (15, 0, math.nan, Outcome.FAIL),
    ],
)
def test_outcomes(dense, kept, kl, expected):
    groups = [Group.of("x", [comparison([kl], 1)])]
    assert outcome(judge(groups, answers(dense, kept), Thresholds(0.95, 0.05, 0.9))) is expected


def test_every_group_must_pass():
    good, bad = (Group.of(name, [comparison([0.0] * 4, n)]) for name, n in (("a", 4), ("b", 2)))
    checks = judge([good, bad], answers(16, 16), Thresholds(0.95, 0.05, 0.9))
    assert [(one.where, one.what) for one in checks if not one.ok] == [("b", "top1")]


def test_a_check_is_sure_when_its_interval_keeps_to_one_side():
    for asked, sure in ((0.1, True), (0.5, False), (0.99, True)):
        assert Check("x", "kl", share_estimate([10], [20]), asked, True).sure is sure
    assert Check("x", "kl", None, 0.5, None).sure
    assert not Check("x", "kl", Estimate(0.1, None, None), 0.5, True).sure


@pytest.mark.parametrize("bad", [(1.1, 0, 0), (0, -1, 0), (0, math.nan, 0), (0, 0, 2)])
def test_thresholds_are_checked(bad):
    with pytest.raises(UserError, match="must"):
        Thresholds(*bad)


def asked(knows, wanted, has_time=lambda tokens: True):
    """What is asked of a model that has `knows(kind, tokens)` of 8 answers right."""
    seen = []

    def ask(kind, tokens):
        seen.append((kind, tokens))
        right = knows(kind, tokens)
        return [comparison([0.0], 1, (i < right, True)) for i in range(8)]

    found = list(
        ask_until(ask, "hme", wanted=wanted, longest=8000, shortest=1000, has_time=has_time)
    )
    assert len(found) == 8 * len(seen)
    return seen


def test_a_model_that_knows_all_is_asked_at_the_longest_length():
    assert asked(lambda kind, tokens: 8, 32) == [(kind, 8000) for kind in "hmeh"]


def test_contexts_become_shorter_until_the_model_knows_half():
    seen = asked(lambda kind, tokens: {"h": 0, "m": 8 * (tokens <= 2000), "e": 8}[kind], 80)
    assert [tokens for kind, tokens in seen if kind == "h"] == [8000, 4000, 2000, 1000]
    assert [tokens for kind, tokens in seen if kind == "m"][:4] == [8000, 4000, 2000, 2000]
    assert {tokens for kind, tokens in seen if kind == "e"} == {8000}


def test_a_model_that_knows_nothing_is_not_asked_for_ever():
    assert len(asked(lambda kind, tokens: 0, 16)) == 12


def test_needles_keep_to_the_time():
    left = itertools.count(0)
    assert len(asked(lambda kind, tokens: 8, 1000, lambda tokens: next(left) < 20)) < 20
    assert asked(lambda kind, tokens: 8, 16, lambda tokens: tokens <= 2000) == [
        ("h", 2000),
        ("m", 2000),
    ]
    assert asked(lambda kind, tokens: 8, 16, lambda tokens: False) == []


class Letters:
    """A checkpoint whose tokens are bytes."""

    path = "letters"
    tokenizer = SimpleNamespace(unk_token_id=None)

    def encode(self, text):
        return list(text.encode())

    encode_rest = encode


@pytest.mark.parametrize("kind", KINDS)
def test_needles_are_far_and_what_is_asked_for(kind):
    found = haystack(Letters(), WINDOW, kind, 8000, [0, 1])
    assert 7000 < len(found.context) <= 8000 - ROOM
    text = bytes(found.context).decode()
    assert len(found.questions) == 8
    for question, answer in found.questions:
        # "The number of Lima is" " 123", or a line "key: value".
        subject = bytes(question).decode().strip().removesuffix(" is").split()[-1]
        value = bytes(answer).decode().strip()
        fact = f"{subject}: {value}\n" if "keys" in kind else f"of {subject} is {value}. "
        assert text.count(fact) == 1
        place = len(text[: text.index(fact)].encode())
        assert WINDOW.sink <= place
        assert place + len(fact) < WINDOW.boundary(len(found.context) + len(question) + 1)
    again = haystack(Letters(), WINDOW, kind, 8000, [0, 1])
    other = haystack(Letters(), WINDOW, kind, 8000, [0, 2])
    assert again.context == found.context != other.context


def test_too_short_a_context_has_no_needles():
    with pytest.raises(UserError, match="no room for far needles"):
        haystack(Letters(), WINDOW, "number in prose", 500, [0])


@pytest.mark.parametrize(
    ("window", "longest", "expected"),
    [
        (WINDOW, 8192, (1024, 2048, 4096, 8192)),
        (WINDOW, 3000, (1024, 2048, 3000)),
        (WINDOW, 700, (700,)),
        (Window(128, 1024), 8192, (4096, 8192)),
    ],
)
def test_lengths_double_up_to_the_longest(window, longest, expected):
    assert doublings(window, longest) == expected


PACE = Pace(tokens=1000, read=1.0, compare=0.5, weights=1e8, per_key=1e5, layers=10)


def test_long_prompts_take_more_than_their_share():
    assert PACE.reading(1000) == pytest.approx(1)
    # 8 times the weights' part, 64 times that of attention, which was a third.
    assert PACE.reading(8000) == pytest.approx(8 * 2 / 3 + 64 / 3)
    assert PACE.comparing(4000) == 2


def test_the_longest_length_that_fits_is_chosen():
    work = Work(texts=4, kinds=3, needles=0, data=())
    lengths = (8192, 4096, 2048, 1024)
    plans = [choose_plan(PACE, WINDOW, work, lengths, seconds) for seconds in (1e4, 100, 40)]
    assert [plan.longest for plan in plans] == [8192, 4096, 2048]
    for plan, seconds in zip(plans, (1e4, 100, 40), strict=True):
        assert plan.seconds <= seconds
        assert plan.lengths == doublings(WINDOW, plan.longest)
    assert [plan.layer_texts for plan in plans] == [3, 1, 1]
    with pytest.raises(
        UserError, match=r"it takes about \d+ minutes with up to 1,024 tokens"
    ) as it:
        choose_plan(PACE, WINDOW, work, lengths, 5)
    assert str(it.value).endswith("or a smaller --max-tokens, --needles or --texts")
    minutes = int(str(it.value).split("--minutes ")[1].split(",")[0])
    assert choose_plan(PACE, WINDOW, work, lengths, 60 * minutes)
    longer = Work(4, 3, 40, [9000] * 8)
    with pytest.raises(UserError, match="--max-tokens, --needles or --max-prompts"):
        choose_plan(PACE, WINDOW, longer, lengths, 5)
    plan = choose_plan(PACE, WINDOW, longer, [4096], 1e5)
    # Prompts are cut to the longest length.
    assert plan.data == pytest.approx(8 * (PACE.reading(4096) + PACE.comparing(4096)))
    assert plan.needles > 40 * PACE.comparing(4096)


def test_a_users_prompts_are_cut_or_left_out():
    samples = [
        ("f", Sample([1] * n, answer)) for n, answer in ((900, [2] * 8), (300, []), (352, []))
    ]
    kept, notes = far_samples(samples, WINDOW, longest=600, room=20)
    assert [len(one.prompt) for _, one in kept] == [592, 352]
    assert notes == [
        "f: 1 prompts were cut to their last 600 tokens",
        "f: 1 prompts without far tokens were left out",
    ]
    with pytest.raises(UserError, match="an answer has 8 tokens; with its prompt it may have 8"):
        far_samples(samples, WINDOW, longest=8, room=20)


def test_layers_are_called_as_the_model_has_them():
    """A model with other layers between those that have an archive."""
    findings = SimpleNamespace(
        checks=[], notes=[], layer_kl=np.array([0.1, 0.3]), layer_bits=np.array([2.0, 1.0]),
        layers_together=0.5, layer_tokens=64,
        setting=SimpleNamespace(
            served=SimpleNamespace(mask=SimpleNamespace(geometry=SimpleNamespace(layers=(1, 4))))
        ),
    )  # fmt: skip
    (line,) = remarks(findings)
    assert "4 (0.30000, 1.00 bits), 1 (0.10000, 2.00 bits); all together" in line
