"""Whether what was measured is good enough."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from vllm_leank.errors import UserError
from vllm_leank.offline.intervals import Estimate, share_estimate
from vllm_leank.offline.verify.comparison import Comparison, Group

LEAST_ANSWERS = 16
"""Answers are judged by so many that dense attention has right, or not at all."""


@dataclass(frozen=True)
class Thresholds:
    """What a mask must reach to pass.

    Raises:
        UserError: a threshold is out of range.
    """

    top1: float
    kl: float
    answers: float

    def __post_init__(self) -> None:
        for name, share in (("--min-top1", self.top1), ("--min-answers", self.answers)):
            if not 0 <= share <= 1:
                raise UserError(f"{name} is {share}; it must lie between 0 and 1")
        if not self.kl >= 0:
            raise UserError(f"--max-kl is {self.kl}; it must be 0 or more")


@dataclass(frozen=True)
class Answers:
    """Questions whose right answer is known.

    `kept` counts the answers that dense attention has right which leank has right as well; `share`
    is their share, None where dense attention has none right.
    """

    asked: int
    dense_right: int
    kept: int
    share: Estimate | None

    @classmethod
    def of(cls, comparisons: Sequence[Comparison]) -> "Answers":
        """Those among the comparisons."""
        asked = [one for one in comparisons if one.dense_right is not None]
        judged = [one for one in asked if one.dense_right]
        dense = Counter(one.context for one in judged)
        kept = Counter(one.context for one in judged if one.leank_right)
        share = share_estimate([kept[one] for one in dense], [*dense.values()]) if dense else None
        return cls(len(asked), dense.total(), kept.total(), share)

    @property
    def judged(self) -> bool:
        """Whether there are enough to judge by."""
        return self.dense_right >= LEAST_ANSWERS


@dataclass(frozen=True)
class Check:
    """One figure against what is asked of it.

    `where` names the group, or is "answers"; `what` is "top1", "kl" or "answers". `ok` is None
    where nothing was judged.
    """

    where: str
    what: str
    measured: Estimate | None
    asked: float
    ok: bool | None

    @property
    def sure(self) -> bool:
        """Whether the whole interval lies on one side of what is asked, where anything was judged.
        A few prompts have none.
        """
        if self.measured is None:
            return True
        if self.measured.low is None or self.measured.high is None:
            return False
        return not self.measured.low < self.asked < self.measured.high


class Outcome(Enum):
    """What is said in the end; the values are exit codes."""

    PASS = 0
    FAIL = 1
    NOT_JUDGED = 3


def judge(groups: Sequence[Group], answers: Answers, thresholds: Thresholds) -> list[Check]:
    """Every figure that is asked for. What is not a number reaches nothing."""
    checks = []
    for group in groups:
        top1, kl = group.top1, group.kl
        checks.append(
            Check(group.name, "top1", top1, thresholds.top1, top1.value >= thresholds.top1)
        )
        checks.append(Check(group.name, "kl", kl, thresholds.kl, kl.value <= thresholds.kl))
    share = answers.share if answers.judged else None
    ok = None if share is None else share.value >= thresholds.answers
    return [*checks, Check("answers", "answers", share, thresholds.answers, ok)]


def outcome(checks: Sequence[Check]) -> Outcome:
    """Failed where any figure is, passed where all are, and else not judged to the end."""
    reached = [check.ok for check in checks]
    if False in reached:
        return Outcome.FAIL
    return Outcome.NOT_JUDGED if None in reached else Outcome.PASS
