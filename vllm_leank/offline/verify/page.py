"""One page to look at: figures, plots and the worst prompts of findings, in a single file."""

import itertools
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from vllm_leank.core.atomic import write_atomically
from vllm_leank.errors import UserError
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.offline.verify.charts import kl_by_layer, kl_by_position
from vllm_leank.offline.verify.comparison import Comparison
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
from vllm_leank.version import __version__

WORST = 6
"""Prompts that are shown."""

LOUD = 0.5
"""Nats at which a token has its full colour."""

Decode = Callable[[Sequence[int]], str]
"""Text of token ids."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } h3 { font-size: 1rem }
table { border-collapse: collapse } th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd;
  text-align: right } th:first-child, td:first-child { text-align: left }
.ok { color: #17752e } .no { color: #b3261e } .verdict { font-weight: bold }
svg { max-width: 100%; height: auto }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .8rem;
  max-height: 40rem; overflow: auto }
.before { color: #888 }
"""


def write_page(path: Path, findings: Findings, checkpoint: Checkpoint) -> None:
    """Write the page in one step.

    Raises:
        UserError: it cannot be written.
    """
    text = page(findings, _decoder(checkpoint))
    try:
        write_atomically(path, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def page(findings: Findings, decode: Decode) -> str:
    """The page as HTML that needs no other file; `decode` gives the text of tokens."""
    title = f"leank verify: {findings.setting.model}"
    mark = {Outcome.PASS: "ok", Outcome.FAIL: "no"}.get(findings.outcome, "")
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict {mark}">{escape(verdict(findings))}</p>',
        *_paragraphs(setting_lines(findings)),
        "<h2>Next tokens</h2>",
        _figures(findings),
        "<h2>Answers</h2>",
        _answers(findings),
        *_paragraphs([answers_line(findings)]),
        "<h2>To know besides</h2>",
        *_paragraphs(remarks(findings)),
    ]
    if findings.texts:
        parts += [
            "<h2>KL over position</h2>",
            "<p>Each text is read once; at each length what follows is compared, dense and with "
            "leank. Rising lines cost more the longer the context.</p>",
            kl_by_position(findings),
        ]
    if findings.layers:
        parts += [
            "<h2>KL by layer</h2>",
            f"<p>One layer alone reads its archive, all others are dense, over "
            f"{findings.layer_tokens} tokens at the longest length. All together: "
            f"{findings.layers_together:.5f}; the sum of the single ones: "
            f"{findings.layer_kl.sum():.5f}. A layer that costs much wants more bits.</p>",
            kl_by_layer(findings),
        ]
    parts += [
        "<h2>Where it differs most</h2>",
        "<p>The end of the prompt is grey. The redder a token, the further its expectation has "
        "moved; point at it to see what either would have written.</p>",
        *(_prompt(one, decode) for one in worst(findings)),
        f"<p>vllm-leank {escape(__version__)}, {findings.seconds:.0f} seconds</p>",
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def worst(findings: Findings) -> list[Comparison]:
    """What differs most, lost answers first; of needles those that dense attention has right."""
    judged = [
        *findings.texts,
        *findings.data,
        *(one for one in findings.needles if one.dense_right),
    ]

    def lost(one: Comparison) -> bool:
        return bool(one.dense_right) and not one.leank_right

    return sorted(judged, key=lambda one: (lost(one), one.kl), reverse=True)[:WORST]


def _paragraphs(lines: Sequence[str]) -> list[str]:
    return [f"<p>{escape(line)}</p>" for line in lines]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _figures(findings: Findings) -> str:
    marks = {True: "ok", False: "no", None: ""}
    reached = {(check.where, check.what): marks[check.ok] for check in findings.checks}

    def cell(where: str, what: str, text: str) -> str:
        mark = reached[where, what]
        return f'{text} <span class="{mark}">{mark}</span>'

    rows = [
        [
            escape(group.name),
            str(group.samples),
            f"{group.positions:,}",
            cell(group.name, "top1", percent(group.top1)),
            cell(group.name, "kl", nats(group.kl)),
        ]
        for group in findings.groups
    ]
    asked = findings.thresholds
    rows.append(["asked", "", "", f"at least {asked.top1:.1%}", f"at most {asked.kl:g}"])
    return _table(["", "samples", "tokens", "same top-1 (95%)", "KL, nats per token (95%)"], rows)


def _answers(findings: Findings) -> str:
    rows = []
    for kind, asked in findings.answers_by_kind.items():
        known = [one for one in asked if one.dense_right]
        kept = sum(bool(one.leank_right) for one in known)
        sizes = [one.prompt_tokens for one in asked]
        tokens = f"{min(sizes):,}-{max(sizes):,}"
        rows.append([escape(kind), str(len(asked)), tokens, str(len(known)), str(kept)])
    return _table(["", "asked", "prompt tokens", "right, dense", "leank, of these"], rows)


def _prompt(one: Comparison, decode: Decode) -> str:
    """The end of a prompt, and what follows it."""
    right = ""
    if one.dense_right is not None:
        words = {True: "right", False: "wrong", None: "unknown"}
        right = f", dense {words[one.dense_right]}, leank {words[one.leank_right]}"
    head = (
        f"{one.source}, {one.prompt_tokens:,} tokens read, KL {one.kl:.4f}, same top-1 "
        f"{one.found.agree} of {len(one.tokens)}{right}"
    )
    first, *rest = _pieces(one.tokens, decode)
    spans = [escape(first)]
    found = one.found
    # What is known after a token is the expectation of the one that follows it.
    for text, kl, dense, leank in zip(
        rest, found.kl[:-1], found.dense_top[:-1], found.other_top[:-1], strict=True
    ):
        hint = f"KL {kl:.4f}; dense {decode([int(dense)])!r}, leank {decode([int(leank)])!r}"
        color = f"rgba(220,40,30,{min(1.0, kl / LOUD):.2f})"
        spans.append(
            f'<span style="background:{color}" title="{escape(hint)}">{escape(text)}</span>'
        )
    before = escape(decode(one.before))
    return (
        f"<h3>{escape(head)}</h3>\n"
        f'<pre><span class="before">… {before}</span>{"".join(spans)}</pre>'
    )


def _pieces(ids: Sequence[int], decode: Decode) -> list[str]:
    """What each token adds to the text; characters of several tokens come with their last."""
    texts = [decode(ids[:end]).rstrip("\N{REPLACEMENT CHARACTER}") for end in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]


def _decoder(checkpoint: Checkpoint) -> Decode:
    """Text of tokens; their ids where there is no tokenizer."""
    try:
        tokenizer = checkpoint.tokenizer
    except UserError:
        return lambda ids: "".join(f"{token} " for token in ids)
    return lambda ids: str(tokenizer.decode(list(ids)))
