"""`leank bench`: measure decode attention and whole engines, and plot the results."""

import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Measure speed and capacity.", no_args_is_help=True)

Out = Annotated[
    Path | None, typer.Option(help="Write the results to this file, as JSON.", show_default="none")
]
Overwrite = Annotated[bool, typer.Option(help="Replace an existing file.")]
Commit = Annotated[
    str | None, typer.Option(help="The commit that is measured.", show_default="asked of git")
]


@app.command()
def attention(
    mask: Annotated[Path, typer.Option(help="Mask file whose layers are measured.")],
    query_heads: Annotated[int, typer.Option(help="Query heads of a layer.")],
    batch: Annotated[int, typer.Option(help="Requests of the case.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of each request.")] = 32768,
    case: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BATCH,LENGTH[,SINK,RECENT]",
            help="Measure this case instead of --batch and --length; may be given several times.",
            show_default="none",
        ),
    ] = None,
    sink: Annotated[
        int | None, typer.Option(help="First tokens that stay dense.", show_default="the mask's")
    ] = None,
    recent: Annotated[
        int | None, typer.Option(help="Last tokens that stay dense.", show_default="the mask's")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="0,5,9", help="Layers to measure.", show_default="all")
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16"], typer.Option(help="Of the model.")
    ] = "bfloat16",
    archive_dtype: Annotated[
        Literal["auto", "fp8", "both"], typer.Option(help="Of far tokens; auto is the model's.")
    ] = "auto",
    out: Out = None,
    overwrite: Overwrite = False,
    commit: Commit = None,
) -> None:
    """Time the decode kernel on a mask's layers beside FlashAttention in bf16 and fp8.

    Needs an NVIDIA GPU. Nothing is reported unless the kernels give the reference's results.
    """
    from vllm_leank.bench.cases import parse_case, parse_layers
    from vllm_leank.bench.machine import require_gpu
    from vllm_leank.bench.results import check_new, describe_mask, header, save_results
    from vllm_leank.mask import load_mask
    from vllm_leank.window import STEP

    begin = time.monotonic()
    check_new(out, overwrite)
    loaded = load_mask(mask)
    sink = -(-loaded.sink // STEP) * STEP if sink is None else sink
    recent = loaded.recent if recent is None else recent
    cases = [parse_case(text, sink, recent) for text in case or [f"{batch},{length}"]]
    chosen = parse_layers(layers, loaded.geometry.num_layers)

    require_gpu("leank bench attention")
    from vllm_leank.bench.attention import DTYPES, Shape, measure
    from vllm_leank.bench.report_attention import print_attention

    archive_dtypes = ["auto", "fp8"] if archive_dtype == "both" else [archive_dtype]
    shape = Shape(loaded, chosen, query_heads, DTYPES[dtype], archive_dtypes)
    measured = measure(shape, cases, tell=lambda line: print(line, file=sys.stderr, flush=True))
    results = header(commit) | {"what": "decode attention, mean over layers"}
    results |= {"seconds": round(time.monotonic() - begin, 1), "mask": describe_mask(loaded)}
    results |= measured
    print_attention(results)
    if out is not None:
        save_results(results, out)
