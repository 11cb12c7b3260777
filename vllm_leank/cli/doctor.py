"""`leank doctor`: whether everything is in place, and what a `vllm serve` line would do."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_leank.cli.outputs import quiet_vllm
from vllm_leank.cli.sizes import readable

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_leank.core.capacity import Capacity
    from vllm_leank.serving.environment import Fact
    from vllm_leank.serving.serve_line import Serving


def doctor(
    line: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- vllm serve MODEL",
            help="A line to look at as well, with all its flags, behind two dashes. Variables of "
            "its environment stand before leank.",
            show_default="none",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at the installation and, without starting it, at a `vllm serve` line.

    Says which mask, window and pages the line would get, and everything that would be refused.

    Exit code 1 if leank cannot serve here, or would not serve this line.
    """
    quiet_vllm()
    from vllm_leank.serving.environment import environment
    from vllm_leank.serving.vllm import versions

    facts = list(environment(with_vllm=bool(line)))
    serving = None
    if line and versions.vllm_version() is not None:
        from vllm_leank.serving.serve_line import examine

        serving = examine(line)
    ok = not any(fact.problem for fact in facts) and not (serving and serving.reasons)
    if as_json:
        described = None if serving is None else _describe(serving)
        report = {"ok": ok, "environment": [asdict(fact) for fact in facts], "serve": described}
        print(json.dumps(report, indent=2))
    else:
        _print(facts, serving)
    raise typer.Exit(0 if ok else 1)


def _describe(serving: "Serving") -> dict[str, Any]:
    """Everything about a line, as plain values."""
    described: dict[str, Any] = {"reasons": list(serving.reasons)}
    if serving.settings is None:
        return described
    from vllm_leank.serving.report import warnings_of

    mask, window, plan = serving.settings.mask, serving.settings.window, serving.settings.plan
    selection = serving.settings.selection
    described |= {
        "layers": {"served": list(mask.geometry.layers), "of": mask.geometry.num_layers},
        "mask": {"path": str(mask.path), "sha256": mask.sha256, "model": mask.model},
        "window": {"sink": window.sink, "recent": window.recent},
        "prefill": "exact" if window.exact else "pruned",
        "segments": None if selection is None else asdict(selection),
        "plan": {
            "archive_format": plan.archive_format.name,
            "far_token_bytes": plan.archive_token_bytes,
            "dense_token_bytes": plan.dense_token_bytes,
            "archive_block": plan.archive_block,
            "window_block": plan.window_block,
            "block_bytes": plan.block_bytes,
        },
        "max_model_len": serving.length,
        "pool_bytes": serving.pool_bytes,
        "warnings": warnings_of(mask, serving.length),
    }
    if serving.pool_bytes is not None and serving.length is not None:
        from vllm_leank.cli.capacity_table import capacity_json

        described["engines"] = capacity_json(_capacities(serving))
    return described


def _print(facts: list["Fact"], serving: "Serving | None") -> None:
    from rich.console import Console

    # Lines are as long as they are: a terminal wraps them, and a file keeps them whole.
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    width = max(len(fact.name) for fact in facts)
    for fact in facts:
        mark = "[red]no[/]" if fact.problem else "[green]ok[/]"
        console.print(f"{mark}  {fact.name:{width}}  {_plain(fact.value)}")
    for fact in facts:
        if fact.problem:
            console.print(f"[red]{fact.name}:[/] {_plain(fact.problem)}")
    if serving is None:
        console.print("a line to look at as well: leank doctor -- vllm serve MODEL ...")
    else:
        _print_serving(console, serving)


def _print_serving(console: "Console", serving: "Serving") -> None:
    from vllm_leank.cli.capacity_table import (
        capacity_table,
        what_a_step_reads,
        what_does_not_fit,
        what_fits_with_leank_alone,
    )
    from vllm_leank.serving.report import describe, warnings_of

    if serving.reasons:
        console.print("[red]leank would not serve this line:[/]")
        for reason in serving.reasons:
            console.print(f"  * {_plain(reason)}")
    else:
        console.print("[green]leank would serve this line[/]")
    if serving.settings is None:
        return
    for text in describe(serving.settings):
        console.print(text, markup=False)
    for warning in warnings_of(serving.settings.mask, serving.length):
        console.print(f"[yellow]{_plain(warning)}[/]")
    if serving.pool_bytes is None or serving.length is None:
        console.print("leank capacity: known with --kv-cache-memory-bytes, or on a GPU")
        return
    capacities = _capacities(serving)
    console.print(f"\ncache of {readable(serving.pool_bytes)} on each device")
    console.print(capacity_table(capacities, serving.length))
    console.print(what_a_step_reads(capacities))
    if told := what_does_not_fit(capacities) or what_fits_with_leank_alone(capacities):
        console.print(told)


def _plain(text: str) -> str:
    """A text for the console as it is: no markup, and nothing that steers a terminal."""
    from rich.markup import escape

    from vllm_leank.errors import printable_lines

    return escape(printable_lines(text))


def _capacities(serving: "Serving") -> "dict[str, Capacity]":
    """What fits, of a line whose settings, pool and longest request are known."""
    from vllm_leank.core.capacity import compare

    settings, pool, length = serving.settings, serving.pool_bytes, serving.length
    assert settings is not None
    assert pool is not None
    assert length is not None
    return compare(
        settings.plan, settings.window, pool, length, serving.in_flight, settings.selection
    )
