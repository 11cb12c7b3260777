"""`leank bench`: measure decode attention and whole engines, and plot the results."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vllm_leank.bench.serve import DEFAULT_VARIANTS, VARIANTS
from vllm_leank.cli.options import (
    ArchiveDtype,
    ModelArgument,
    ModelOption,
    Pages,
    RecentOfMask,
    SinkOfMask,
    one_model,
)
from vllm_leank.cli.outputs import check_new
from vllm_leank.errors import UserError

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
    sink: SinkOfMask = None,
    recent: RecentOfMask = None,
    layers: Annotated[
        str | None, typer.Option(metavar="0,5,9", help="Layers to measure.", show_default="all")
    ] = None,
    pages: Pages = None,
    dtype: Annotated[
        Literal["bfloat16", "float16"], typer.Option(help="Of the model.")
    ] = "bfloat16",
    archive_dtype: ArchiveDtype = None,
    out: Out = None,
    overwrite: Overwrite = False,
    commit: Commit = None,
) -> None:
    """Time the decode kernel on a mask's layers beside FlashAttention in 16 and 8 bits.

    Needs an NVIDIA GPU. Nothing is reported unless the kernels give the reference's results. The
    file of --out is written anew after each case.
    """
    from vllm_leank.bench.cases import parse_case, parse_layers
    from vllm_leank.bench.machine import require_gpu
    from vllm_leank.bench.results import ATTENTION, describe_mask, header, save_results
    from vllm_leank.core.options import KEY, parse_options
    from vllm_leank.core.selection import Selection, whole_or_share
    from vllm_leank.core.window import whole_granules
    from vllm_leank.mask.file import load_mask

    begin = time.monotonic()
    if out is not None:
        check_new(out, overwrite)
    loaded = load_mask(mask)
    sink = whole_granules(loaded.sink) if sink is None else sink
    recent = loaded.recent if recent is None else recent
    cases = [parse_case(text, sink, recent) for text in case or [f"{batch},{length}"]]
    chosen = parse_layers(layers, len(loaded.geometry.layers))
    asked = parse_options({KEY: {"pages": whole_or_share(pages)}}).pages
    selection = None if asked is None else Selection.of(asked)

    require_gpu("leank bench attention")
    from vllm_leank.bench.attention import DTYPES, Shape, measure
    from vllm_leank.bench.report_attention import print_attention

    shape = Shape(loaded, chosen, query_heads, DTYPES[dtype], selection)
    results = header(ATTENTION, commit) | {"mask": describe_mask(loaded)}
    for measured in measure(
        shape, cases, tell=lambda line: print(line, file=sys.stderr, flush=True)
    ):
        results |= {"seconds": round(time.monotonic() - begin, 1)} | measured
        if out is not None:
            save_results(results, out)
    print_attention(results)


@app.command()
def serve(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    variants: Annotated[
        str,
        typer.Option(help=f"What to run: {', '.join(VARIANTS)}."),
    ] = ",".join(DEFAULT_VARIANTS),
    mask: Annotated[
        Path | None, typer.Option(help="Mask file.", show_default="looked up by model")
    ] = None,
    sink: SinkOfMask = None,
    recent: RecentOfMask = None,
    pages: Pages = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32000,
    output_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens per request that are measured, at most.")
    ] = 256,
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts that are submitted at once: more than fit.")
    ] = 128,
    lone_prompts: Annotated[
        int,
        typer.Option(min=0, help="Prompts whose time to first token is measured; 0 saves time."),
    ] = 3,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Longest request; must leave room for what early requests generate until the "
            "last one has started.",
            show_default="prompt and output tokens, and 1024",
        ),
    ] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="vLLM's.")] = 0.92,
    load_format: Annotated[str, typer.Option(help="vLLM's; dummy for random weights.")] = "auto",
    engine_args: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="More engine arguments.", show_default="none"),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="Seconds to wait for steady decoding of a variant.")
    ] = 600,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts.")] = 0,
    out: Out = None,
    overwrite: Overwrite = False,
    commit: Commit = None,
) -> None:
    """Compare whole engines: requests at once, decode speed, time to first and per token.

    One variant after the other gets the same prompts of random tokens. The file of --out is written
    anew after each. Beside the default variants there are leank-pruned, and vLLM's caches of 4
    bits, int4_per_token_head and turboquant_4bit_nc.
    """
    from vllm_leank.bench import serve as serving
    from vllm_leank.bench.report_serve import print_serve
    from vllm_leank.bench.results import SERVE, describe_mask, header, save_results
    from vllm_leank.core.options import parse_options
    from vllm_leank.core.selection import whole_or_share
    from vllm_leank.mask.checkpoint import Checkpoint
    from vllm_leank.mask.lookup import resolve_mask
    from vllm_leank.mask.settings import plan_settings

    model = one_model(model, model_option, "leank bench serve MODEL --mask mask.yaml")
    if out is not None:
        check_new(out, overwrite)
    chosen = serving.parse_variants(variants)
    serving.require_vllm()
    if max_model_len is None:
        max_model_len = prompt_tokens + output_tokens + 1024
    common: dict[str, Any] = {
        "model": model,
        "load_format": load_format,
        "max_model_len": max_model_len,
        "gpu_memory_utilization": gpu_memory_utilization,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    common |= (more := serving.parse_engine_args(engine_args))
    serving.refuse_args_of_variants(more)
    longest, least = common["max_model_len"], prompt_tokens + output_tokens
    if isinstance(longest, int) and 0 < longest < least:
        raise UserError(
            f"--max-model-len is {longest}; prompts of {prompt_tokens} tokens that generate "
            f"{output_tokens} need {least}, and more until the last one has started"
        )
    given: dict[str, Any] = {
        "mask": None if mask is None else str(mask),
        "sink": sink,
        "recent": recent,
        "pages": whole_or_share(pages),
    }
    leank = {name: value for name, value in given.items() if value is not None}
    asked = {
        variant: parse_options(serving.variant_args(variant, leank)["additional_config"])
        for variant in chosen
        if variant.startswith("leank")
    }
    if leank and not asked:
        raise UserError(
            f"--{', --'.join(leank)} would change nothing: --variants has no engine of leank"
        )
    load = {
        "prompt_tokens": prompt_tokens,
        "steady_steps": output_tokens,
        "num_prompts": num_prompts,
        "lone_prompts": lone_prompts,
        "seed": seed,
        "limit_s": time_limit,
    }
    results = header(SERVE, commit) | {"load": {"model": model} | load}
    if asked:
        overrides = common.get("hf_overrides")
        geometry = Checkpoint.open(model, overrides=overrides).geometry
        found = resolve_mask(given["mask"], model, geometry, overrides=overrides)
        results["mask"] = describe_mask(found)
        for options in asked.values():
            plan_settings(found, options, itemsize=2)
    results["variants"] = []
    try:
        for variant in chosen:
            arguments = common | serving.variant_args(variant, leank)
            one = serving.run_variant(variant, load | {"engine_args": arguments})
            results["variants"].append(one)
            results["ratios"] = serving.ratios(results["variants"])
            if out is not None:
                save_results(results, out)
    finally:
        # What was measured before an engine failed is shown all the same.
        if results["variants"]:
            print_serve(results)


@app.command()
def plot(
    results: Annotated[
        list[Path],
        typer.Argument(metavar="RESULTS...", help="Files that `leank bench attention` wrote."),
    ],
    out: Annotated[Path, typer.Option(help="The picture: a .png, .svg or .pdf file.")],
    overwrite: Overwrite = False,
) -> None:
    """Draw the speed-up of decode attention against context length and batch."""
    from vllm_leank.bench.plot import plot_speedup

    check_new(out, overwrite)
    plot_speedup(results, out)
    print(f"{out}: written")
