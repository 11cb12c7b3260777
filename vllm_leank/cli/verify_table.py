"""What `leank verify` prints."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_leank.offline.verify.findings import Findings
from vllm_leank.offline.verify.verdict import Outcome
from vllm_leank.offline.verify.words import (
    answers_line,
    nats,
    percent,
    remarks,
    setting_lines,
    verdict,
)

_MARKS = {True: "[green]ok[/]", False: "[red]no[/]", None: "- "}
_COLORS = {Outcome.PASS: "green", Outcome.FAIL: "red", Outcome.NOT_JUDGED: "yellow"}


def print_findings(findings: Findings, report: Path | None) -> None:
    """All figures, what was asked of them, and the verdict."""
    console = Console(highlight=False)
    for line in setting_lines(findings):
        console.print(line, markup=False, soft_wrap=True)
    console.print()
    console.print(_figures(findings))
    console.print()
    if findings.answers.asked:
        console.print(_answers(findings))
    mark = _MARKS[findings.checks[-1].ok]
    console.print(f"{mark} {escape(answers_line(findings))}", soft_wrap=True)
    console.print()
    for line in remarks(findings):
        console.print(line, markup=False, soft_wrap=True)
    if report is not None:
        console.print(f"{report}: plots and the worst prompts", markup=False, soft_wrap=True)
    console.print(f"[bold {_COLORS[findings.outcome]}]{escape(verdict(findings))}[/]")


def _table(*names: str) -> Table:
    """A table that fits into 80 columns, with the first one on the left."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left", no_wrap=number > 0)
    return table


def _figures(findings: Findings) -> Table:
    """Next tokens, by group."""
    table = _table("next tokens", "tokens", "same top-1 (95%)", "KL, nats per token (95%)")
    reached = {(check.where, check.what): _MARKS[check.ok] for check in findings.checks}
    for group in findings.groups:
        table.add_row(
            escape(group.name),
            f"{group.positions:,}",
            f"{percent(group.top1)} {reached[group.name, 'top1']}",
            f"{nats(group.kl)} {reached[group.name, 'kl']}",
        )
    thresholds = findings.thresholds
    table.add_section()
    table.add_row(
        "asked", "", f"at least {thresholds.top1:.1%}   ", f"at most {thresholds.kl:g}   "
    )
    return table


def _answers(findings: Findings) -> Table:
    """Known answers, by kind."""
    table = _table("answers", "asked", "prompt tokens", "right, dense", "leank, of these")
    for kind, asked in findings.answers_by_kind.items():
        sizes = [one.prompt_tokens for one in asked]
        known = [one for one in asked if one.dense_right]
        table.add_row(
            escape(kind),
            str(len(asked)),
            f"{min(sizes):,}-{max(sizes):,}",
            str(len(known)),
            str(sum(bool(one.leank_right) for one in known)),
        )
    return table
