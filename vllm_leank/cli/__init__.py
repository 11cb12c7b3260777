"""The command `leank`; each group of sub-commands has a module here.

Modules import what is slow (torch, transformers) inside the command that needs it.
"""

import errno
import sys
from typing import Annotated

import typer

from vllm_leank.cli import (
    bench,
    doctor,
    evaluation,
    mask,
    mask_calibrate,
    mask_compose,
    mask_heads,
    mask_learn,
    mask_plot,
    mask_prompts,
    mask_pull,
    plan,
    serve,
    verify,
)
from vllm_leank.errors import UserError, shortened
from vllm_leank.version import __version__

app = typer.Typer(
    help="Smaller KV caches for long contexts in vLLM. "
    "From nothing to a server: `leank serve MODEL --bits 2`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"vllm-leank {__version__}")
        raise typer.Exit


@app.callback()
def _leank(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    """Runs before every command."""


mask.app.command()(mask_calibrate.calibrate)
mask.app.command()(mask_learn.learn)
mask.app.command()(mask_compose.compose)
mask.app.command()(mask_plot.plot)
mask.app.command()(mask_heads.heads)
mask.app.command()(mask_prompts.prompts)
mask.app.command()(mask_pull.pull)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(serve.serve)
app.command()(plan.plan)
app.command()(doctor.doctor)
app.command()(verify.verify)
app.add_typer(mask.app, name="mask")
app.add_typer(evaluation.app, name="eval")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run the command line; what the user can fix ends in one message and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"leank: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"leank: {shortened(error.filename)}: a name too long for files", file=sys.stderr)
        sys.exit(2)
