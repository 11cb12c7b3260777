"""`leank eval`: benchmarks against a running server."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_leank.errors import UserError

app = typer.Typer(help="Run benchmarks against a running server.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Keep `ruler` a sub-command while it is the only one."""


@app.command()
def ruler(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model's name on the server.")],
    base_url: Annotated[str, typer.Option(help="The server.")] = "http://localhost:8000",
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print lm_eval's command lines only.")
    ] = False,
) -> None:
    """Measure RULER with lm_eval, one run per length.

    Ask a dense server the same, for comparison. Needs lm_eval with its extras api and ruler.
    """
    from vllm_leank.offline.ruler import Ruler, chosen_tasks, require_lm_eval

    run = Ruler(
        model=model,
        base_url=base_url,
        tokenizer=tokenizer or model,
        tasks=chosen_tasks(tasks),
        concurrency=concurrency,
        timeout=timeout,
        limit=limit,
        out=out,
    )
    commands = [run.command(length) for length in _lengths(lengths)]
    if not dry_run:
        require_lm_eval()
    for command in commands:
        print(shlex.join(command), file=sys.stdout if dry_run else sys.stderr, flush=True)
        if dry_run:
            continue
        done = subprocess.run(
            command, env={"TOKENIZERS_PARALLELISM": "false"} | os.environ, check=False
        )
        if done.returncode:
            raise UserError(f"lm_eval ended with exit code {done.returncode}; its log is above")


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise UserError(f"--lengths is {text!r}; it must be numbers of tokens, like 4096,8192")
    return lengths
