"""`leank mask learn`: make a mask by LeanK's two stages of distillation."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_leank.cli.options import Device, Dtype, ModelId, Overrides, Recent, Sink
from vllm_leank.cli.outputs import check_new, report_mask


def learn(
    model: Annotated[str, typer.Option(help="Checkpoint: a directory or a hub id.")],
    ratio: Annotated[float, typer.Option(help="Share of the K channels to prune, 0..1.")],
    out: Annotated[Path, typer.Option(help="The mask file to write.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help='JSONL, lines {"prompt": "...", "answer": "..."}, or token ids as '
            '"prompt_token_ids" and "answer_token_ids".',
            show_default="two generated tasks",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Prose for the generated tasks, any text file.", show_default="repeated sentences"
        ),
    ] = None,
    align: Annotated[int, typer.Option(help="Heads keep multiples of this many channels.")] = 32,
    sink: Sink = 64,
    recent: Recent = 256,
    steps: Annotated[
        int, typer.Option(help="Steps of stage 1; stage 2 takes a tenth as many.")
    ] = 2000,
    lr: Annotated[float, typer.Option(help="Learning rate of stage 1; stage 2 takes half.")] = 0.02,
    reg: Annotated[float, typer.Option(help="Weight of the mean factor in stage 1.")] = 0.06,
    min_tokens: Annotated[int, typer.Option(help="Shortest generated sample.")] = 4096,
    max_tokens: Annotated[
        int, typer.Option(help="Longest sample; prompts of --data are cut to their last tokens.")
    ] = 32768,
    chunk: Annotated[
        int, typer.Option(help="Prompt tokens computed at once; fewer take less memory.")
    ] = 4096,
    seed: Annotated[int, typer.Option(help="Of the data.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    hf_overrides: Overrides = None,
    model_id: ModelId = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Where an interrupted run goes on from; of a finished run, stage 1 serves other "
            "ratios.",
            show_default="OUT.state",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Draw factors and losses: a .png, .svg or .pdf file; needs matplotlib.",
            show_default="none",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace existing files.")] = False,
) -> None:
    """Learn a mask: scaling factors by distillation, then the channels to keep.

    Start it with `accelerate launch` or `torchrun` to use more GPUs, one sample on each per step.
    """
    check_new(out, overwrite)
    state = state or out.with_name(out.name + ".state")
    if picture is not None:
        from vllm_leank.mask.pictures import check_picture

        check_new(picture, overwrite)
        check_picture(picture)
    from vllm_leank.learn.data import Data
    from vllm_leank.learn.run import learn as run
    from vllm_leank.learn.stages import Recipe
    from vllm_leank.mask.file import save_mask
    from vllm_leank.offline.mask_request import MaskRequest

    request = MaskRequest.open(
        model, model_id, ratio=ratio, align=align, sink=sink, recent=recent, overrides=hf_overrides
    )
    learned = run(
        request,
        Data(data, text, min_tokens, max_tokens),
        state,
        recipe=Recipe(steps, lr, reg),
        seed=seed,
        chunk=chunk,
        dtype=dtype,
        device=device,
    )
    if learned is None:
        return
    save_mask(learned.mask, out, overwrite=overwrite)
    report_mask(out, learned.mask, ratio)
    if picture is not None:
        from vllm_leank.mask.pictures import draw_learning

        draw_learning(picture, learned.factors, learned.mask.keep, learned.losses)
        print(f"{picture}: factors and losses")
