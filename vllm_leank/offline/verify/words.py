"""Findings in words, alike in the terminal and on the page."""

from collections.abc import Sequence

import numpy as np

from vllm_leank.offline.intervals import Estimate
from vllm_leank.offline.verify.findings import Findings
from vllm_leank.offline.verify.verdict import LEAST_ANSWERS, Check, Outcome

WORST_LAYERS = 4
"""Layers that are named."""

_NAMES = {"top1": "same top-1", "kl": "KL", "answers": "right answers"}


def percent(share: Estimate) -> str:
    """A share with its interval, in percent."""
    if share.low is None or share.high is None:
        return f"{share.value:.1%}"
    return f"{share.value:.1%} ({100 * share.low:.1f}-{100 * share.high:.1f})"


def nats(kl: Estimate) -> str:
    """A divergence with its interval."""
    if kl.low is None or kl.high is None:
        return f"{kl.value:.4f}"
    return f"{kl.value:.4f} ({kl.low:.4f}-{kl.high:.4f})"


def setting_lines(findings: Findings) -> list[str]:
    """What was compared."""
    setting = findings.setting
    served = setting.served
    mask, window, format_name = served.mask, served.window, served.plan.archive_format.name
    how = "" if window.exact else "; prompts read pruned"
    lines = [
        f"mask: {mask.path}, {mask.bits:.2f} bits per element, {mask.k_kept:.1%} of K and "
        f"{mask.v_kept:.1%} of V kept",
        f"archive: {format_name}, compared in {setting.dtype} on {setting.device}",
        f"window: sink {window.sink}, recent {window.recent} tokens dense{how}",
    ]
    return lines if served.selection is None else [*lines, f"pages: {served.selection}"]


def answers_line(findings: Findings) -> str:
    """What was found of answers."""
    answers = findings.answers
    if answers.share is None or not answers.judged:
        return (
            f"right answers kept: not judged, as dense attention has {answers.dense_right} of "
            f"{answers.asked} right, and it takes {LEAST_ANSWERS} to judge by"
        )
    return (
        f"right answers kept: {answers.kept} of {answers.dense_right} = {percent(answers.share)}, "
        f"asked: at least {findings.thresholds.answers:.1%}"
    )


def verdict(findings: Findings) -> str:
    """The last line."""
    missed = _named([check for check in findings.checks if check.ok is False])
    return {
        Outcome.PASS: "PASS",
        Outcome.FAIL: f"FAIL: {missed}",
        Outcome.NOT_JUDGED: "PASS as far as judged; answers were not judged",
    }[findings.outcome]


def remarks(findings: Findings) -> list[str]:
    """What else should be known."""
    lines = []
    if unsure := [check for check in findings.checks if not check.sure]:
        lines.append(
            "not sure, as their intervals reach over what is asked, or prompts are too few: "
            f"{_named(unsure)}; more --texts, --needles or --data would tell"
        )
    if len(kl := findings.layer_kl):
        bits, layers = findings.layer_bits, findings.setting.served.mask.geometry.layers
        worst = ", ".join(
            f"{layers[row]} ({kl[row]:.5f}, {bits[row]:.2f} bits)"
            for row in np.argsort(-kl)[:WORST_LAYERS]
        )
        lines.append(
            f"layers that cost most, in KL when only they are archived: {worst}; all together "
            f"{findings.layers_together:.5f}, on {findings.layer_tokens} tokens"
        )
    return [*lines, *findings.notes]


def _named(checks: Sequence[Check]) -> str:
    return ", ".join(
        _NAMES[check.what] + (f" ({check.where})" if check.what != "answers" else "")
        for check in checks
    )
