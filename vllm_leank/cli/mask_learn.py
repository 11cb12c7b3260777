"""`leank mask learn`: make a mask by distillation, from a calibration, a mask, or nothing."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_leank.cli.options import (
    Device,
    Dtype,
    ModelArgument,
    ModelId,
    ModelOption,
    Overrides,
    Recent,
    Sink,
    one_model,
)
from vllm_leank.cli.outputs import check_apart, check_new, report_mask
from vllm_leank.errors import UserError


def learn(
    *,
    model: ModelArgument = None,
    model_option: ModelOption = None,
    ratio: Annotated[float, typer.Option(help="Share of the K channels to prune, 0..1.")],
    out: Annotated[Path, typer.Option(help="The mask file to write.")],
    start: Annotated[
        str,
        typer.Option(
            "--from",  # torchrun takes --start for its own --start-method
            metavar="fisher|MASK.yaml|nothing",
            help="Where learning starts: fisher is the mask of leank mask calibrate --ratio, which "
            "is made first; or a mask that was made so, as a file; or nothing, LeanK's own recipe "
            "of two stages.",
        ),
    ] = "fisher",
    data: Annotated[
        Path | None,
        typer.Option(
            help='JSONL, lines {"prompt": "...", "answer": "..."}, or token ids as '
            '"prompt_token_ids" and "answer_token_ids".',
            show_default="built-in prompts; from nothing, two generated tasks",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="With --from nothing: prose for the generated tasks, any text file.",
            show_default="repeated sentences",
        ),
    ] = None,
    align: Annotated[int, typer.Option(help="Heads keep multiples of this many channels.")] = 32,
    sink: Sink = 64,
    recent: Recent = 256,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps; from nothing those of stage 1, and stage 2 takes a tenth as many.",
            show_default="150; from nothing 2000",
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate; from nothing that of stage 1, and stage 2 takes half.",
            show_default="0.002; from nothing 0.02",
        ),
    ] = None,
    reg: Annotated[
        float | None,
        typer.Option(
            help="With --from nothing: weight of the mean factor in stage 1.", show_default="0.06"
        ),
    ] = None,
    patience: Annotated[
        int,
        typer.Option(
            help="Stop when so many checks in a row find no better mask on held-out samples; there "
            "are six."
        ),
    ] = 3,
    min_tokens: Annotated[int, typer.Option(help="Shortest built-in or generated sample.")] = 4096,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Longest sample; prompts of --data are cut to their last tokens.",
            show_default="16384; from nothing 32768",
        ),
    ] = None,
    chunk: Annotated[
        int, typer.Option(help="Prompt tokens computed at once; fewer take less memory.")
    ] = 4096,
    seed: Annotated[int, typer.Option(min=0, help="Of the data.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    hf_overrides: Overrides = None,
    model_id: ModelId = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Where an interrupted run goes on from; of a finished run, calibration or stage 1 "
            "serves other ratios.",
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
    """Learn which K channels to keep: from a mask that is calibrated first, by distillation.

    A few samples are held out to judge masks by; what is written is the best, be it the first.

    Start it with `accelerate launch` or `torchrun` to use more GPUs, one sample on each per step.
    """
    name = one_model(model, model_option, "leank mask learn MODEL --ratio 0.7 --out mask.yaml")
    if reg is not None and start != "nothing":
        raise UserError("--reg goes with --from nothing: it is of the stage that others leave out")
    check_new(out, overwrite)
    state = state or out.with_name(out.name + ".state")
    check_apart(out=out, state=state, picture=picture)
    check_new(state, overwrite=True)
    if picture is not None:
        from vllm_leank.mask.pictures import check_picture

        check_new(picture, overwrite)
        check_picture(picture)
    from vllm_leank.learn.data import Data
    from vllm_leank.learn.run import FISHER, NOTHING
    from vllm_leank.learn.run import learn as run
    from vllm_leank.learn.stages import Recipe, Refinement
    from vllm_leank.mask.file import save_mask
    from vllm_leank.offline.mask_request import MaskRequest

    request = MaskRequest.open(
        name, model_id, ratio=ratio, align=align, sink=sink, recent=recent, overrides=hf_overrides
    )
    recipe: Recipe | Refinement
    if from_nothing := start == NOTHING:
        recipe = Recipe(**_given(steps=steps, lr=lr, reg=reg))
    else:
        recipe = Refinement(**_given(steps=steps, lr=lr))
    longest = (32768 if from_nothing else 16384) if max_tokens is None else max_tokens
    learned = run(
        request,
        Data(data, text, min_tokens, longest, generated=from_nothing),
        state,
        recipe=recipe,
        start=None if start in (FISHER, NOTHING) else Path(start),
        seed=seed,
        chunk=chunk,
        dtype=dtype,
        device=device,
        patience=patience,
    )
    if learned is None:
        return
    save_mask(learned.mask, out, overwrite=overwrite)
    report_mask(out, learned.mask, ratio)
    print(learned.outcome)
    if picture is not None:
        from vllm_leank.mask.pictures import draw_learning

        held_out = learned.checks.steps, learned.checks.losses
        draw_learning(picture, learned.factors, learned.mask, learned.losses, held_out)
        print(f"{picture}: factors and losses")


def _given(**options: Any) -> dict[str, Any]:
    """The options that are given: recipes know what others are."""
    return {name: value for name, value in options.items() if value is not None}
