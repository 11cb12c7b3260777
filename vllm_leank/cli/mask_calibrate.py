"""`leank mask calibrate`: make a mask from sample prompts, without training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_leank.cli.options import (
    RECENT,
    SINK,
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
from vllm_leank.cli.outputs import check_new, place_name, report_mask, say, tell_of_others
from vllm_leank.errors import UserError
from vllm_leank.mask.folders import make_user_folder
from vllm_leank.mask.names import file_name, model_name

if TYPE_CHECKING:
    from vllm_leank.mask.mask import Mask
    from vllm_leank.offline.calibration_prompts import CalibrationPrompts
    from vllm_leank.offline.mask_request import BitsRequest, MaskRequest


def calibrate(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits per element of far K and V, 0.75 to 8: 4 makes far tokens about 3.7 times "
            "smaller than 16 bits, scales included, 2 about 7 times.",
            show_default=False,
        ),
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            help="Instead of --bits: share of the K channels to prune, 0..1, as LeanK does.",
            show_default=False,
        ),
    ] = None,
    streaming: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the KV heads, 0..1, that keep nothing of far tokens, as DuoAttention's "
            "streaming heads: those without which answers lose least. --bits and --ratio are then "
            "of the other heads, so the cache is smaller by this share.",
            show_default="none",
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            help="With --ratio, what channels are chosen by: fisher, what the answer loses without "
            "them, or energy, their part of logits times the attention on far tokens.",
            show_default="fisher",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The mask file to write.", show_default="in your folder of masks, with --bits"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help='JSONL, lines {"prompt_token_ids": [...]} or {"prompt": "..."}.',
            show_default="built-in prompts",
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            "--prompts",
            "--max-prompts",
            min=1,
            help="Prompts to use; of --data the first ones.",
            show_default="16, of --data 64",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest prompt. Should be what will be served; longer ones of --data are cut to "
            "their last tokens.",
            show_default="what the model takes, up to 32,768 on a GPU and 2,048 on a CPU",
        ),
    ] = None,
    align: Annotated[
        int | None,
        typer.Option(
            help="With --ratio: heads keep multiples of this many channels.", show_default="32"
        ),
    ] = None,
    sink: Sink = SINK,
    recent: Recent = RECENT,
    query_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --score energy: take queries from the last tokens of each prompt only.",
            show_default="all",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of built-in prompts and drawn labels.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    hf_overrides: Overrides = None,
    model_id: ModelId = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Make a mask without training: bits for each channel, or LeanK's pruned channels, and with
    --streaming heads that see no far tokens.

    How much the model's answers depend on each channel of far K and V is measured by a few
    backward passes per prompt. With --bits, `vllm serve MODEL --attention-backend leank` finds the
    mask by itself.
    """
    name = one_model(model, model_option, "leank mask calibrate MODEL --bits 2")
    _check_choice(bits, ratio, score, align, query_tokens, streaming)
    out = out or _default_out(model_id or model_name(name), bits, streaming)
    check_new(out, overwrite)

    from vllm_leank.mask.file import save_mask
    from vllm_leank.offline.calibration_prompts import calibration_prompts, longest_prompt
    from vllm_leank.offline.mask_request import BitsRequest, MaskRequest

    request: BitsRequest | MaskRequest
    if bits is not None:
        request = BitsRequest.open(
            name,
            model_id,
            bits=bits,
            sink=sink,
            recent=recent,
            streaming=streaming or 0,
            overrides=hf_overrides,
        )
    else:
        assert ratio is not None
        request = MaskRequest.open(
            name,
            model_id,
            ratio=ratio,
            align=align or 32,
            sink=sink,
            recent=recent,
            streaming=streaming or 0,
            overrides=hf_overrides,
        )
    checkpoint = request.checkpoint
    device = checkpoint.place(device, dtype)
    limit = longest_prompt(checkpoint, max_tokens, device)
    read = calibration_prompts(
        checkpoint, data, request.window, max_tokens=limit, count=prompts, seed=seed
    )
    default = f"by default on {place_name(device)}; --max-tokens changes it"
    where = "--max-tokens" if max_tokens else default
    say(f"{name}: calibrating on {read} (at most {limit:,}, {where})")
    mask = measured_mask(
        request, read, device, seed=seed, dtype=dtype, score=score, query_tokens=query_tokens
    )
    save_mask(mask, out, overwrite=overwrite)
    report_mask(out, mask, ratio)
    tell_of_others(out, mask)


def measured_mask(
    request: "BitsRequest | MaskRequest",
    prompts: "CalibrationPrompts",
    device: str,
    *,
    seed: int = 0,
    dtype: str = "auto",
    score: str | None = None,
    query_tokens: int | None = None,
) -> "Mask":
    """The mask of a request, from what its model does with prompts; see `calibrate` for the rest.

    Raises:
        UserError: the model cannot be loaded or observed, or is too large for the device.
    """
    import torch

    from vllm_leank.offline.calibrate import energy_mask
    from vllm_leank.offline.calibrate_bits import measure, pruned_mask
    from vllm_leank.offline.mask_request import MaskRequest
    from vllm_leank.offline.weigh_layers import weighed_mask

    try:
        model = request.checkpoint.load(dtype, device)
        if isinstance(request, MaskRequest) and score == "energy":
            return energy_mask(request, model, prompts, query_tokens)
        far = prompts.with_far(request.window)
        if left_out := len(prompts.ids) - len(far.ids):
            say(f"{left_out} of {len(prompts.ids)} prompts are too short for far tokens: left out")
        measured = measure(model, far, request.window, seed, request.streaming)
        if isinstance(request, MaskRequest):
            return pruned_mask(request, measured)
        return weighed_mask(request, measured, model, far.ids)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{request.checkpoint.path}: calibrating it takes more memory than is free on "
            f"{place_name(device)}; leank mask calibrate takes shorter prompts with --max-tokens, "
            "and another device with --device, as in --device cpu"
        ) from error


def _check_choice(
    bits: float | None,
    ratio: float | None,
    score: str | None,
    align: int | None,
    query_tokens: int | None,
    streaming: float | None,
) -> None:
    """Refuse options that do not go together."""
    if bits is None and ratio is None:
        raise UserError(
            "give --bits, as in --bits 2 for far tokens 7 times smaller, or --ratio to prune "
            "channels of K"
        )
    if bits is not None and ratio is not None:
        raise UserError("--bits and --ratio exclude each other: give one")
    if score not in (None, "fisher", "energy"):
        raise UserError(f"--score is {score}; allowed: fisher, energy")
    if bits is not None and score == "energy":
        raise UserError("--score energy goes with --ratio; --bits takes fisher")
    if bits is not None and align is not None:
        raise UserError("--align goes with --ratio; --bits has widths of its own")
    if query_tokens is not None and score != "energy":
        raise UserError("--query-tokens goes with --score energy")
    if streaming is not None and score == "energy":
        raise UserError("--streaming goes with --score fisher, which measures what heads lose")


def _default_out(model_id: str, bits: float | None, streaming: float | None) -> Path:
    """A file in the user's folder, which is made here so that faults are known before the work."""
    if bits is None:
        raise UserError("--ratio needs --out, the mask file to write")
    return make_user_folder() / file_name(model_id, bits, streaming or 0)
