"""`leank verify`: whether a mask keeps a model's answers."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_leank.cli.options import Device, Dtype, RecentOfMask, SinkOfMask
from vllm_leank.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from vllm_leank.core.window import Window
    from vllm_leank.mask.checkpoint import Checkpoint
    from vllm_leank.offline.verify import Comparison, Summary, Thresholds
    from vllm_leank.offline.verify_samples import Named


def verify(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Checkpoint: a directory or a hub id.")
    ],
    mask: Annotated[
        str | None, typer.Option(help="Mask file.", show_default="looked up by model")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help='Your prompts, JSONL: lines {"prompt": "..."} or {"prompt_token_ids": [...]}, '
            'with "answer" or "answer_token_ids" where the right one is known.',
            show_default="needles only",
        ),
    ] = None,
    needles: Annotated[int, typer.Option(min=0, help="Generated haystacks to ask as well.")] = 8,
    max_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts of --data to use, the first ones.")
    ] = 16,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longest sample; prompts are cut to their last tokens.")
    ] = 8192,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens the model writes after a prompt without answer.")
    ] = 32,
    sink: SinkOfMask = None,
    recent: RecentOfMask = None,
    prefill: Annotated[str, typer.Option(help="How prompts are read: exact or pruned.")] = "exact",
    archive_dtype: Annotated[
        str, typer.Option(help="How far tokens are stored, as the server's option says.")
    ] = "auto",
    min_top1: Annotated[
        float, typer.Option(help="Least share of tokens with the same most likely token, 0..1.")
    ] = 0.95,
    max_kl: Annotated[
        float, typer.Option(help="Greatest mean divergence, in nats per token.")
    ] = 0.05,
    min_answers: Annotated[
        float,
        typer.Option(help="Least share of dense attention's right answers that are kept, 0..1."),
    ] = 0.9,
    seed: Annotated[int, typer.Option(min=0, help="Of the needles.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that a mask keeps a model's answers: dense attention against leank, PASS or FAIL.

    Both read the same prompts and the same continuations: the known answer, or what the model
    writes with dense attention. Compared are the distributions of the next token, and how many
    answers would be right. Runs the model in transformers, with far tokens as leank's archive gives
    them back: rounded to its bits, channels that are not stored as their means.

    Exit code 1 if a threshold is missed.
    """
    from rich.console import Console
    from rich.progress import track

    from vllm_leank.core.options import KEY, parse_options
    from vllm_leank.mask.checkpoint import Checkpoint, usable_device
    from vllm_leank.mask.lookup import resolve_mask
    from vllm_leank.mask.settings import plan_settings
    from vllm_leank.offline.verify import Summary, Thresholds, Verifier, by_length

    begin = time.monotonic()
    thresholds = Thresholds(min_top1, max_kl, min_answers)
    device = usable_device(device)
    checkpoint = Checkpoint.open(model)
    found = resolve_mask(mask, model, checkpoint.geometry)
    # As served; the window does not depend on the bytes of a number.
    options = parse_options(
        {
            KEY: {
                "sink": sink,
                "recent": recent,
                "prefill": prefill,
                "archive_dtype": archive_dtype,
            }
        }
    )
    window = plan_settings(found, options, itemsize=2).window
    samples, notes = _samples(
        checkpoint,
        window,
        data,
        needles=needles,
        max_prompts=max_prompts,
        max_tokens=max_tokens,
        tokens=tokens,
        seed=seed,
    )
    loaded = checkpoint.load(dtype, device)
    verifier = Verifier(loaded, found, window, archive_dtype=archive_dtype, tokens=tokens)
    comparisons = list(
        track(
            verifier.compare(samples),
            "comparing",
            total=len(samples),
            console=Console(file=sys.stderr),
        )
    )
    summary = Summary.of(comparisons)
    verdict = thresholds.judge(summary)
    if verdict["answers"] is None:
        notes.append(
            "answers: not judged, as no sample has a known one"
            if not summary.answers
            else "answers: not judged, as dense attention gets none right either"
        )
    ok = False not in verdict.values()
    if as_json:
        report: dict[str, Any] = {
            "pass": ok,
            "model": model,
            "mask": {"path": str(found.path), "sha256": found.sha256, "k_kept": found.k_kept},
            "window": {"sink": window.sink, "recent": window.recent},
            "prefill": prefill,
            "archive_dtype": verifier.archive_format.name,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": device,
            **asdict(summary),
            "lengths": [asdict(one) for one in by_length(comparisons)],
            "thresholds": asdict(thresholds),
            "reached": verdict,
            "notes": notes,
            "each": [asdict(one) for one in comparisons],
            "seconds": round(time.monotonic() - begin, 1),
        }
        print(json.dumps(report, indent=2))
    else:
        print(f"mask: {found.path}, {found.k_kept:.1%} of K and {found.v_kept:.1%} of V kept")
        print(f"archive: {verifier.archive_format.name}, mask of {found.bits:.2f} bits per element")
        how = "" if window.exact else "; prompts read pruned"
        print(f"window: sink {window.sink}, recent {window.recent} tokens dense{how}")
        _print(comparisons, summary, thresholds, verdict, notes)
    raise typer.Exit(0 if ok else 1)


def _samples(
    checkpoint: "Checkpoint",
    window: "Window",
    data: Path | None,
    *,
    needles: int,
    max_prompts: int,
    max_tokens: int,
    tokens: int,
    seed: int,
) -> tuple[list["Named"], list[str]]:
    """What to ask, and what to say about what is not asked."""
    from vllm_leank.offline.verify_samples import file_samples, needle_samples

    samples: list[Named] = []
    notes = []
    if data is not None:
        samples, short = file_samples(
            data,
            checkpoint,
            window,
            max_samples=max_prompts,
            max_tokens=max_tokens,
            room=tokens,
        )
        if short:
            notes.append(f"{data.name}: {short} prompts without far tokens were left out")
    if needles:
        try:
            samples += needle_samples(
                checkpoint, window, count=needles, max_tokens=max_tokens, seed=seed
            )
        except UserError as error:
            notes.append(f"needles were left out: {error}")
    if not samples:
        advice = "give prompts with far tokens by --data prompts.jsonl"
        raise UserError("; ".join(["nothing to compare", *notes, advice]))
    return samples, notes


def _print(
    comparisons: Sequence["Comparison"],
    summary: "Summary",
    thresholds: "Thresholds",
    verdict: dict[str, bool | None],
    notes: Sequence[str],
) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from vllm_leank.offline.verify import Summary, by_length

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in (
        "samples",
        "tokens\ncompared",
        "same\ntop-1",
        "KL",
        "right,\ndense",
        "right,\nleank",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for source in dict.fromkeys(one.source for one in comparisons):
        part = Summary.of([one for one in comparisons if one.source == source])
        _row(table, escape(source), part)
    table.add_section()
    for length in by_length(comparisons):
        _row(table, f"up to {length.most:,} tokens", length.summary)
    table.add_section()
    _row(table, "all", summary)
    console.print(table)

    kept = "-" if summary.kept is None else f"{summary.kept:.1%}"
    for name, what, measured, needed in (
        ("top1", "tokens with the same top-1", f"{summary.top1:.1%}", f">= {thresholds.top1:.1%}"),
        ("kl", "KL, nats per token", f"{summary.kl:.4f}", f"<= {thresholds.kl:g}"),
        ("answers", "right answers kept", kept, f">= {thresholds.answers:.1%}"),
    ):
        mark = {True: "[green]ok  [/]", False: "[red]no  [/]", None: "-   "}[verdict[name]]
        console.print(f"  {mark}{what:<28}{measured:>9}  (asked {needed})")
    for note in notes:
        console.print(escape(note), soft_wrap=True)
    console.print("[bold red]FAIL[/]" if False in verdict.values() else "[bold green]PASS[/]")


def _row(table: "Table", name: str, part: "Summary") -> None:
    answers = (part.dense_right, part.leank_right)
    table.add_row(
        name,
        str(part.samples),
        str(part.positions),
        f"{part.top1:.1%}",
        f"{part.kl:.4f}",
        *(f"{right} of {part.answers}" if part.answers else "" for right in answers),
    )
