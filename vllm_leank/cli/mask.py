"""`leank mask`: look at masks and make them."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_leank.cli.outputs import check_new, report_mask
from vllm_leank.errors import UserError
from vllm_leank.mask.file import load_mask, save_mask
from vllm_leank.mask.lookup import find_masks
from vllm_leank.mask.mask import Mask

app = typer.Typer(help="Look at masks and make them.", no_args_is_help=True)

_BF16_BYTES = 2


@app.command()
def show(
    mask: Annotated[str, typer.Argument(metavar="FILE|MODEL", help="A mask file or a model id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a mask keeps and what that saves."""
    found = find(mask)
    summary = _summary(found)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        _print_tables(found, summary)


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="Checkpoint: a directory or a hub id.")],
    data: Annotated[
        Path, typer.Option(help='JSONL, lines {"prompt_token_ids": [...]} or {"prompt": "..."}.')
    ],
    ratio: Annotated[float, typer.Option(help="Share of the K channels to prune, 0..1.")],
    out: Annotated[Path, typer.Option(help="The mask file to write.")],
    align: Annotated[int, typer.Option(help="Heads keep multiples of this many channels.")] = 32,
    sink: Annotated[int, typer.Option(help="First tokens that stay dense.")] = 64,
    recent: Annotated[int, typer.Option(help="Last tokens that stay dense.")] = 256,
    max_prompts: Annotated[int, typer.Option(min=1, help="Prompts to use, the first ones.")] = 64,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longer prompts are cut to their last tokens.")
    ] = 8192,
    query_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Take queries from the last tokens of each prompt only.", show_default="all"
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="Where to run.", show_default="the GPU if there is one")
    ] = None,
    model_id: Annotated[
        str | None,
        typer.Option(help="The id the mask is found by.", show_default="name of the checkpoint"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Make a mask without training, from q, K and far attention over sample prompts."""
    check_new(out, overwrite)
    from vllm_leank.offline import calibrate as calibration

    mask = calibration.calibrate(
        model,
        data,
        ratio=ratio,
        align=align,
        sink=sink,
        recent=recent,
        max_prompts=max_prompts,
        max_tokens=max_tokens,
        query_tokens=query_tokens,
        dtype=dtype,
        device=device,
        model_id=model_id,
    )
    save_mask(mask, out, overwrite=overwrite)
    report_mask(out, mask, ratio)


@app.command(name="import")
def import_file(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A .pth mask or a .tsv file of factors from LeanK's code."
        ),
    ],
    model: Annotated[
        str, typer.Option(help="Whose mask it is: a directory with config.json, or a hub id.")
    ],
    out: Annotated[Path, typer.Option(help="The mask file to write.")],
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of the K channels to prune, 0..1; factors only.", show_default="none"
        ),
    ] = None,
    align: Annotated[int, typer.Option(help="Heads keep multiples of this many channels.")] = 32,
    sink: Annotated[int, typer.Option(help="First tokens that stay dense.")] = 128,
    recent: Annotated[int, typer.Option(help="Last tokens that stay dense.")] = 768,
    model_id: Annotated[
        str | None,
        typer.Option(help="The id the mask is found by.", show_default="name of the checkpoint"),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Turn a mask or the scaling factors of the official LeanK code into a mask file."""
    check_new(out, overwrite)
    from vllm_leank.mask.import_mask import import_mask

    mask = import_mask(
        source, model, ratio=ratio, align=align, sink=sink, recent=recent, model_id=model_id
    )
    save_mask(mask, out, overwrite=overwrite)
    report_mask(out, mask, ratio)


def find(name: str) -> Mask:
    """The mask in a file, or the one of the package for a model id."""
    if Path(name).is_file():
        return load_mask(name)
    masks = find_masks(name)
    if len(masks) == 1:
        return masks[0]
    if masks:
        files = ", ".join(str(mask.path) for mask in masks)
        raise UserError(f"{name} has several masks, name one of the files: {files}")
    raise UserError(f"{name}: neither a mask file nor a model that a bundled mask is for")


def _summary(mask: Mask) -> dict[str, Any]:
    """Everything `show` shows, as plain values; bytes are of one far token over all layers."""
    dense = mask.keep.size * 2 * _BF16_BYTES
    kept = round(dense * mask.far_bytes_share)
    counts = Counter(mask.kept_counts.reshape(-1).tolist())
    return {
        "path": None if mask.path is None else str(mask.path),
        "sha256": mask.sha256,
        "model": mask.model,
        "geometry": mask.geometry.as_dict(),
        "align": mask.align,
        "window": {"sink": mask.sink, "recent": mask.recent},
        "heads_by_kept": {str(kept): counts[kept] for kept in sorted(counts)},
        "k_kept": mask.k_kept,
        "v_kept": mask.v_kept,
        "far_token_bytes_bf16": {"dense": dense, "kept": kept},
        "far_bytes_share": mask.far_bytes_share,
        "speed_bound": dense / kept if kept else None,
        "kept_by_layer": mask.kept_counts.tolist(),
        "provenance": mask.provenance,
        "evaluation": mask.evaluation,
    }


def _print_tables(mask: Mask, summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    geometry = mask.geometry
    dense, kept = summary["far_token_bytes_bf16"].values()
    bound = "none" if summary["speed_bound"] is None else f"{summary['speed_bound']:.2f}x"
    facts = Table(title=f"mask for {mask.model}", title_justify="left", show_header=False)
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row(
        "layers x KV heads x head_dim",
        "{num_layers} x {num_kv_heads} x {head_dim}".format(**geometry.as_dict()),
    )
    facts.add_row("RoPE", escape(f"theta {geometry.rope_theta}, scaling {geometry.rope_scaling}"))
    facts.add_row("dense tokens", f"first {mask.sink}, last {mask.recent}")
    for channels, heads in summary["heads_by_kept"].items():
        facts.add_row(f"heads keeping {channels}", str(heads))
    facts.add_row("K kept", f"{mask.k_kept:.2%}")
    facts.add_row("V kept", f"{mask.v_kept:.2%}")
    facts.add_row(
        "bytes per far token (bf16)", f"{kept:,} of {dense:,} ({mask.far_bytes_share:.1%})"
    )
    facts.add_row("bound on attention speed", bound)
    for key, value in {**mask.provenance, "sha256": mask.sha256}.items():
        facts.add_row(escape(key), escape(str(value)))

    layers = Table(title="channels kept", title_justify="left")
    layers.add_column("layer", justify="right")
    layers.add_column("per KV head")
    layers.add_column("K kept", justify="right")
    for index, counts in enumerate(mask.kept_counts):
        share = counts.sum() / (geometry.num_kv_heads * geometry.head_dim)
        layers.add_row(str(index), " ".join(f"{count:3d}" for count in counts), f"{share:.1%}")

    console = Console()
    console.print(facts)
    console.print(layers)
