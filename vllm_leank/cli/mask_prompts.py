"""`leank mask prompts`: the built-in prompts as a file."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vllm_leank.cli.options import RECENT, SINK, ModelArgument, ModelOption, Recent, Sink, one_model
from vllm_leank.cli.outputs import check_new
from vllm_leank.errors import UserError


def prompts(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    *,
    out: Annotated[Path, typer.Option(help="The JSONL file to write.")],
    count: Annotated[int, typer.Option("--prompts", min=1, help="How many.")] = 16,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The longest; others have lengths down to an eighth.",
            show_default="as of calibrate: what the model takes, up to 32,768 on a GPU and 2,048 "
            "on a CPU",
        ),
    ] = None,
    sink: Sink = SINK,
    recent: Recent = RECENT,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write the built-in prompts to a file, as the other commands take it by --data. Without
    options it has what `calibrate` reads without --data.

    A start for a file of one's own: a line is a prompt, with its token ids, its answer's, and both
    as text for people.
    """
    model = one_model(model, model_option, "leank mask prompts MODEL --out prompts.jsonl")
    check_new(out, overwrite)
    from vllm_leank.core.atomic import write_atomically
    from vllm_leank.mask.checkpoint import Checkpoint, usable_device
    from vllm_leank.offline.calibration_prompts import built_in_samples, longest_prompt
    from vllm_leank.offline.mask_request import window_of

    checkpoint = Checkpoint.open(model)
    longest = longest_prompt(checkpoint, max_tokens, usable_device(None))
    samples = built_in_samples(checkpoint, window_of(sink, recent), longest, count, seed)
    decode = checkpoint.tokenizer.decode
    lines = [
        {
            "kind": kind,
            "prompt_token_ids": sample.prompt,
            "answer_token_ids": sample.answer,
            "text": decode(sample.prompt + sample.answer),
        }
        for kind, sample in samples
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    try:
        write_atomically(out, text.encode())
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    found = max(len(one.prompt) + len(one.answer) for _, one in samples)
    print(f"{out}: {len(lines)} prompts of up to {found:,} tokens")
