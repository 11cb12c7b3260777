"""`leank verify`: whether a mask keeps a model's answers."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vllm_leank.cli.options import (
    ArchiveDtype,
    Device,
    ModelArgument,
    ModelOption,
    Overrides,
    Pages,
    RecentOfMask,
    SinkOfMask,
    one_model,
)
from vllm_leank.cli.outputs import check_new
from vllm_leank.errors import UserError


def verify(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    mask: Annotated[
        str | None, typer.Option(help="Mask file.", show_default="looked up by model")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help='Your prompts, JSONL: lines {"prompt": "..."} or {"prompt_token_ids": [...]}, '
            'with "answer" or "answer_token_ids" where the right one is known.',
            show_default="built-in texts and needles only",
        ),
    ] = None,
    max_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts of --data to use, the first ones.")
    ] = 16,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens the model writes after a prompt without answer.")
    ] = 32,
    texts: Annotated[
        int, typer.Option(min=0, help="Built-in texts to compare next tokens on; 0: none.")
    ] = 12,
    needles: Annotated[
        int,
        typer.Option(
            min=0,
            help="Needles to find that dense attention finds, 16 or more; 0: none, and answers are "
            "not judged unless --data has as many.",
        ),
    ] = 40,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest sample; prompts of --data are cut to their last tokens.",
            show_default="what the model takes, or what the time allows",
        ),
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0.01, help="Time to take, once the model is loaded.")
    ] = 10,
    sink: SinkOfMask = None,
    recent: RecentOfMask = None,
    prefill: Annotated[str, typer.Option(help="How prompts are read: exact or pruned.")] = "exact",
    pages: Pages = None,
    archive_dtype: ArchiveDtype = None,
    min_top1: Annotated[
        float, typer.Option(help="Least share of tokens with the same most likely token, 0..1.")
    ] = 0.95,
    max_kl: Annotated[
        float, typer.Option(help="Greatest mean divergence, in nats per token.")
    ] = 0.05,
    min_answers: Annotated[
        float,
        typer.Option(help="Least share of dense attention's right answers that are kept, 0..1."),
    ] = 0.9,
    seed: Annotated[int, typer.Option(min=0, help="Of the texts and needles.")] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32, bfloat16 or float16. On a CPU auto is float32, which most CPUs "
            "compute faster."
        ),
    ] = "auto",
    device: Device = None,
    hf_overrides: Overrides = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write a page with plots and the worst prompts, an .html file; needs matplotlib.",
            show_default="none",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing report.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that a mask keeps a model's answers: dense attention against leank, PASS or FAIL.

    Both read the same texts and are asked what comes next, at a short length and at the longest one
    that there is time for, and after your own prompts. Both are asked for needles in long contexts,
    until dense attention has found enough: a mask can only lose what the model knows. Runs the
    model in transformers, with far tokens as leank's archive gives them back: rounded to its bits,
    channels that are not stored as their means; with --pages the best of them alone.

    Exit codes: 0 passed; 1 a threshold was missed; 2 nothing was compared, as an option, a file or
    the model cannot be used; 3 what was judged passed, but too few answers could be judged.
    """
    from vllm_leank.cli.verify_table import print_findings
    from vllm_leank.core.options import KEY, parse_options
    from vllm_leank.core.other_layers import other_layers, refused_prefill
    from vllm_leank.core.selection import whole_or_share
    from vllm_leank.mask.checkpoint import Checkpoint
    from vllm_leank.mask.lookup import resolve_mask
    from vllm_leank.mask.settings import plan_settings
    from vllm_leank.offline.verify.material import Request
    from vllm_leank.offline.verify.run import verify_mask
    from vllm_leank.offline.verify.texts import file_samples
    from vllm_leank.offline.verify.verdict import Thresholds

    model = one_model(model, model_option, "leank verify MODEL")
    if report is not None:
        _check_report(report, overwrite)
    thresholds = Thresholds(min_top1, max_kl, min_answers)
    checkpoint = Checkpoint.open(model, overrides=hf_overrides)
    kind = other_layers(checkpoint.plain or checkpoint.config)
    if reason := refused_prefill(kind, prefill):
        raise UserError(reason)
    device = checkpoint.place(device, dtype)
    found = resolve_mask(mask, model, checkpoint.geometry, overrides=hf_overrides)
    # As served; the window does not depend on the bytes of a number.
    options = {"sink": sink, "recent": recent, "prefill": prefill, "pages": whole_or_share(pages)}
    served = plan_settings(found, parse_options({KEY: options}), itemsize=2)
    samples = []
    if data is not None:
        samples = file_samples(data, checkpoint, max_samples=max_prompts, room=tokens)
    request = Request(texts, needles, samples, tokens, max_tokens, minutes, seed)
    findings = verify_mask(
        checkpoint,
        served,
        request,
        thresholds,
        dtype=dtype,
        device=device,
    )
    if report is not None:
        from vllm_leank.offline.verify.page import write_page

        write_page(report, findings, checkpoint)
    if as_json:
        print(json.dumps(findings.as_dict(), indent=2))
    else:
        print_findings(findings, report)
    raise typer.Exit(findings.outcome.value)


def _check_report(path: Path, overwrite: bool) -> None:
    """Refuse a page that could not be written, before the work."""
    from vllm_leank.mask.pictures import check_matplotlib

    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path}: the report is a page; name it .html")
    check_new(path, overwrite)
    check_matplotlib()
