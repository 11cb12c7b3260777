"""`leank mask`: look at masks and make them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_leank.cli.options import ModelId, Overrides, Recent, Sink
from vllm_leank.cli.outputs import check_new, report_mask
from vllm_leank.errors import UserError

if TYPE_CHECKING:
    from vllm_leank.mask.mask import Mask

app = typer.Typer(help="Look at masks and make them.", no_args_is_help=True)


@app.command()
def show(
    mask: Annotated[str, typer.Argument(metavar="FILE|MODEL", help="A mask file or a model id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a mask keeps and what that saves."""
    from vllm_leank.cli.mask_show import print_tables, summary

    found = find(mask)
    if as_json:
        print(json.dumps(summary(found), indent=2))
    else:
        print_tables(found)


@app.command(name="import")
def import_file(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A .pth mask or a .tsv file of factors from LeanK's code."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="Whose mask it is: a directory with config.json, that file (with --model-id), or "
            "a hub id."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The mask file to write.")],
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of the K channels to prune, 0..1; factors only.", show_default="none"
        ),
    ] = None,
    align: Annotated[int, typer.Option(help="Heads keep multiples of this many channels.")] = 32,
    sink: Sink = 128,
    recent: Recent = 768,
    model_id: ModelId = None,
    hf_overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Turn a mask or the scaling factors of the official LeanK code into a mask file."""
    check_new(out, overwrite)
    from vllm_leank.mask.file import save_mask
    from vllm_leank.mask.import_mask import import_mask

    mask = import_mask(
        source,
        model,
        ratio=ratio,
        align=align,
        sink=sink,
        recent=recent,
        model_id=model_id,
        overrides=hf_overrides,
    )
    save_mask(mask, out, overwrite=overwrite)
    report_mask(out, mask, ratio)


def find(name: str) -> "Mask":
    """The mask in a file, or the user's or the package's one for a model id."""
    from vllm_leank.mask.configs import is_path
    from vllm_leank.mask.file import load_mask
    from vllm_leank.mask.lookup import broken_masks, find_masks, most_careful, preferred

    if Path(name).is_file():
        return load_mask(name)
    masks = most_careful(preferred(find_masks(name)))
    if len(masks) == 1:
        return masks[0]
    if masks:
        files = ", ".join(str(mask.path) for mask in masks)
        raise UserError(f"{name} has several masks, name one of the files: {files}")
    unread = "".join(f"\n  not looked at: {error}" for error in broken_masks())
    named_as_file = Path(name).suffix in (".yaml", ".yml")
    if (named_as_file or is_path(name)) and not Path(name).is_dir():
        raise UserError(f"{name}: no such file{unread}")
    raise UserError(
        f"{name}: no mask is found for a model of this name; leank mask calibrate {name} --bits 2 "
        f"makes one{unread}"
    )
