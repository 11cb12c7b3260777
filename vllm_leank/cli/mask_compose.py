"""`leank mask compose`: join masks."""

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_leank.cli.options import Overrides
from vllm_leank.cli.outputs import check_new, report_mask
from vllm_leank.errors import UserError

if TYPE_CHECKING:
    from vllm_leank.mask.mask import Mask


class By(StrEnum):
    """How several masks are joined."""

    INTERSECTION = "intersection"
    UNION = "union"


def compose(
    out: Annotated[Path, typer.Option(help="The mask file to write.")],
    masks: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Mask files for one model.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Without mask files: begin with every channel of this model."),
    ] = None,
    by: Annotated[
        By, typer.Option(help="Keep the channels that all masks keep, or any of them.")
    ] = By.INTERSECTION,
    streaming: Annotated[
        Path | None,
        typer.Option(
            help="Table of a number per KV head, a line per layer, separated by tabs, as "
            "DuoAttention writes it: heads below 0.5 keep nothing."
        ),
    ] = None,
    streaming_share: Annotated[
        float | None,
        typer.Option(help="Instead of those below 0.5: this share of the heads, lowest first."),
    ] = None,
    dense_layers: Annotated[
        str | None,
        typer.Option(metavar="LAYERS", help="Layers that keep every channel, as in 0,1,30-31."),
    ] = None,
    model_id: Annotated[
        str | None, typer.Option(help="The id the mask is found by.", show_default="the first's")
    ] = None,
    hf_overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Join masks: intersection or union, then streaming heads, then dense layers."""
    check_new(out, overwrite)
    from vllm_leank.mask.compose import compose as join
    from vllm_leank.mask.file import load_mask, save_mask
    from vllm_leank.mask.settings import choose_format

    if (model is None) == (not masks):
        raise UserError("give mask files, or --model to begin with every channel")
    if streaming_share is not None and streaming is None:
        raise UserError("--streaming-share needs --streaming")
    mask = join(
        [load_mask(path) for path in masks]
        if masks
        else [_full(str(model), model_id, hf_overrides)],
        by.value,
        streaming=streaming,
        streaming_share=streaming_share,
        dense_layers=_numbers(dense_layers or ""),
        model_id=model_id,
    )
    choose_format(mask)  # as a server would
    save_mask(mask, out, overwrite=overwrite)
    report_mask(out, mask)


def _full(model: str, model_id: str | None, overrides: dict[str, Any] | None) -> "Mask":
    from vllm_leank.mask.checkpoint import Checkpoint
    from vllm_leank.mask.mask import Mask

    checkpoint = Checkpoint.open(model, model_id, overrides=overrides)
    return Mask.full(checkpoint.geometry, model=checkpoint.id)


def _numbers(text: str) -> list[int]:
    """The numbers of a list with ranges, as in `0,1,30-31`."""
    numbers: set[int] = set()
    for part in text.split(",") if text else []:
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UserError(f"--dense-layers is {text!r}; write layers like 0,1,30-31")
        numbers.update(range(first, last + 1))
    return sorted(numbers)
