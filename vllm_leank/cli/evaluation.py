"""`leank eval`: benchmarks against a running server."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_leank.errors import UserError

if TYPE_CHECKING:
    from vllm_leank.offline.ruler import Ruler
    from vllm_leank.offline.ruler_scores import Scores

app = typer.Typer(help="Run benchmarks against a running server.", no_args_is_help=True)

DEFAULT_URL = "http://localhost:8000"
"""Where `vllm serve` listens by default."""

Part = tuple[int, dict[str, float]]
"""A length, and each task's score at it."""


@app.callback()
def group() -> None:
    """Keep `ruler` a sub-command while it is the only one."""


@app.command()
def ruler(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's name on the server.")],
    base_url: Annotated[
        str | None, typer.Option(help="The server.", show_default=DEFAULT_URL)
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="The model's tokenizer: a directory or hub id.", show_default="MODEL"),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Of lm_eval, by commas; `all` are RULER's 13, `synthetic` the six of them that "
            "download no data."
        ),
    ] = "all",
    lengths: Annotated[
        str,
        typer.Option(
            metavar="4096,8192", help="Tokens of a sample; the server must allow some more."
        ),
    ] = "4096,8192,16384,32768",
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Samples per task and length.", show_default="all 500"),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 32,
    timeout: Annotated[int, typer.Option(min=1, help="Seconds for one answer.")] = 3600,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for lm_eval's results.", show_default="printed only"),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="dense,leank",
            help="Start these servers of MODEL, a directory or hub id, one after the other, "
            "instead of asking --base-url.",
            show_default="none",
        ),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(help="With --compare: leank's mask file.", show_default="looked up by model"),
    ] = None,
    flags: Annotated[
        str, typer.Option(help="With --compare: more flags of vllm serve, for both.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command lines only.")
    ] = False,
) -> None:
    """Measure RULER with lm_eval, one run per length.

    With --compare dense,leank both are measured in one call, and stand side by side. Needs lm_eval
    with its extras api and ruler.
    """
    from vllm_leank.offline.ruler import Ruler, chosen_tasks, require_lm_eval
    from vllm_leank.offline.ruler_scores import join_scores
    from vllm_leank.offline.server import check_serves, serving

    run = Ruler(
        model=model,
        base_url=DEFAULT_URL if base_url is None else base_url,
        tokenizer=tokenizer or model,
        tasks=chosen_tasks(tasks),
        concurrency=concurrency,
        timeout=timeout,
        limit=limit,
        out=out,
    )
    asked = _lengths(lengths)
    if compare is None and (mask is not None or flags):
        raise UserError("--mask and --flags go with --compare: a running server has its own")
    if compare is not None and base_url is not None:
        raise UserError(
            "--base-url and --compare exclude each other: --compare starts servers of its own, on "
            "free ports; give one"
        )
    servers = {} if compare is None else server_lines(compare, model, max(asked), mask, flags)
    if dry_run:
        for name, words in servers.items() or [("", None)]:
            if words is not None:
                print(shlex.join(["vllm", "serve", *words]))
            for length in asked:
                print(shlex.join(_place(run, name).command(length)))
        return
    require_lm_eval()
    measured: dict[str, list[Part]] = {}
    try:
        if not servers:
            check_serves(run.server, model)
            for part in _scores(run, asked):
                measured.setdefault("score", []).append(part)
        for name, words in servers.items():
            print(f"$ {shlex.join(['vllm', 'serve', *words])}", file=sys.stderr, flush=True)
            with serving(words) as url:
                for part in _scores(replace(_place(run, name), base_url=url), asked):
                    measured.setdefault(name, []).append(part)
    finally:
        # What was measured before a server or lm_eval failed is shown all the same.
        if measured:
            _print({name: join_scores(parts) for name, parts in measured.items()}, asked)


def server_lines(
    compare: str, model: str, longest: int, mask: str | None, flags: str
) -> dict[str, list[str]]:
    """What follows `vllm serve` for each server that is compared, by its name.

    Raises:
        UserError: another name than dense and leank, a mask that none of them reads, or flags that
            cannot be read.
    """
    from vllm_leank.offline.ruler import SLACK

    names = [name.strip() for name in compare.split(",")]
    if not set(names) <= {"dense", "leank"} or len(set(names)) < len(names):
        raise UserError(f"--compare is {compare!r}; it takes dense and leank, as in dense,leank")
    if mask is not None and "leank" not in names:
        raise UserError(f"--mask would change nothing: --compare is {compare}, without leank")
    try:
        common = [model, "--max-model-len", str(longest + SLACK), *shlex.split(flags)]
    except ValueError as error:
        raise UserError(f"--flags is {flags!r}: {error}") from error
    chosen = ["--attention-backend", "leank"]
    if mask is not None:
        chosen += ["--additional-config", json.dumps({"leank": {"mask": mask}})]
    return {name: common + (chosen if name == "leank" else []) for name in names}


def _place(run: "Ruler", name: str) -> "Ruler":
    """The run with a folder of its own for what a server's name says."""
    return replace(run, out=run.out / name) if run.out is not None and name else run


def _scores(run: "Ruler", lengths: list[int]) -> Iterator[Part]:
    """Each length and every task's score at it, from a run of lm_eval for each.

    Raises:
        UserError: lm_eval fails.
    """
    from vllm_leank.offline.ruler_scores import read_scores
    from vllm_leank.offline.server import STDERR

    with tempfile.TemporaryDirectory() as folder:
        kept = run if run.out is not None else replace(run, out=Path(folder))
        assert kept.out is not None
        for length in lengths:
            command = kept.command(length)
            print(shlex.join(command), file=sys.stderr, flush=True)
            # Its own table has a row of -1 for each length that was not asked.
            done = subprocess.run(
                command,
                env={"TOKENIZERS_PARALLELISM": "false"} | os.environ,
                stdout=STDERR,
                check=False,
            )
            if done.returncode:
                raise UserError(f"lm_eval ended with exit code {done.returncode}; its log is above")
            yield length, read_scores(kept.out / str(length), length)


def _print(measured: "dict[str, Scores]", lengths: list[int]) -> None:
    """A row per task and length, a column per server."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("task")
    for name in ("tokens", *measured):
        table.add_column(name, justify="right")
    first = next(iter(measured.values()))
    for task in first:
        for length in lengths:
            cells = [scores.get(task, {}).get(length) for scores in measured.values()]
            if any(cell is not None for cell in cells):
                shown = ["none" if cell is None else f"{cell:.1%}" for cell in cells]
                table.add_row(task, f"{length:,}", *shown)
    Console().print(table)


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise UserError(f"--lengths is {text!r}; it must be numbers of tokens, like 4096,8192")
    return lengths
