"""Options that several commands take, each with the same words everywhere."""

import json
from typing import Annotated, Any

import typer

from vllm_leank.errors import UserError

SINK, RECENT = 64, 256
"""What masks are calibrated for, where it is not said."""

ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Checkpoint: a directory or a hub id.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="The same, as an option.", show_default=False)
]


def one_model(model: str | None, option: str | None, example: str) -> str:
    """The model that is named, as argument or as option.

    Raises:
        UserError: none is, or two are.
    """
    if (model is None) == (option is None):
        raise UserError(f"name one model: {example}")
    name = model or option
    assert name is not None
    return name


Sink = Annotated[int, typer.Option(help="First tokens that stay dense.")]
Recent = Annotated[int, typer.Option(help="Last tokens that stay dense.")]

SinkOfMask = Annotated[
    int | None, typer.Option(help="First tokens that stay dense.", show_default="the mask's")
]
RecentOfMask = Annotated[
    int | None, typer.Option(help="Last tokens that stay dense.", show_default="the mask's")
]

ModelId = Annotated[
    str | None,
    typer.Option(help="The id the mask is found by.", show_default="name of the checkpoint"),
]


def _overrides(text: str) -> dict[str, Any]:
    """The object that a text is.

    Raises:
        typer.BadParameter: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{text} is no JSON object")
    return value


Overrides = Annotated[
    Any,
    typer.Option(
        "--hf-overrides",
        parser=_overrides,
        metavar="JSON",
        help="Changes of the model's config, as given to vllm serve (YaRN, say).",
        show_default="none",
    ),
]


def _refuse_archive_dtype(given: str | None) -> None:
    """Say what to use instead of a flag that there was.

    Raises:
        UserError: it is given.
    """
    from vllm_leank.core.options import INSTEAD

    if given is not None:
        raise UserError(f"--archive-dtype {INSTEAD}")


ArchiveDtype = Annotated[str | None, typer.Option(hidden=True, callback=_refuse_archive_dtype)]

Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16, or auto: that of the weights, but float32 on a CPU."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where to run: cpu, cuda, cuda:1, or auto, which spreads the model over all GPUs.",
        show_default="the GPU if there is one",
    ),
]

Pages = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE|TOKENS",
        help="Read this much of far tokens, as the leank option pages.",
        show_default="all",
    ),
]
"""What queries read of far tokens."""
