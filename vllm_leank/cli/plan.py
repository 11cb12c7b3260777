"""`leank plan`: how many requests would fit, before anything is started."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_leank.cli.options import (
    ModelOption,
    Overrides,
    Pages,
    RecentOfMask,
    SinkOfMask,
    one_model,
)
from vllm_leank.cli.plan_line import serve_line
from vllm_leank.cli.plan_report import print_plan
from vllm_leank.cli.sizes import parse_size, readable
from vllm_leank.core.capacity import (
    BATCHED_TOKENS,
    OTHER_BYTES,
    STEPS_AT_ONCE,
    UTILIZATION,
    compare,
    estimate_pool,
    pruned_prefill,
)
from vllm_leank.core.hf_config import fields_of, longest_request
from vllm_leank.core.layers import sliding_layers, state_layers
from vllm_leank.core.other_layers import other_layers, refused_prefill
from vllm_leank.core.window import MOST
from vllm_leank.errors import UserError

if TYPE_CHECKING:
    from vllm_leank.core.options import Options
    from vllm_leank.mask.checkpoint import Checkpoint
    from vllm_leank.mask.mask import Mask
    from vllm_leank.mask.settings import Settings

_ITEMSIZE = 2
"""Bytes of a number of the model: vLLM serves on GPUs in bfloat16 or float16."""

_MOST_GPUS = 4096
"""More than any model is served on."""


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A directory with config.json, that file, or a hub id.",
            show_default="the one of --mask",
        ),
    ] = None,
    model_option: ModelOption = None,
    *,
    max_model_len: Annotated[
        int, typer.Option(min=1, max=MOST, help="Tokens of each request, prompt and answer.")
    ],
    mask: Annotated[
        str | None, typer.Option(help="Mask file.", show_default="looked up by model")
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Instead of a mask, before there is one: bits per element of far K and V, alike "
            "in all heads.",
            show_default="none",
        ),
    ] = None,
    gpu_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Memory of each GPU, as in 141GiB or 80GB.",
            show_default="none",
        ),
    ] = None,
    kv_cache_memory: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Memory of the cache on each GPU, where it is known: instead of --gpu-memory.",
            show_default="none",
        ),
    ] = None,
    weights: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="Size of the whole model's weights.",
            show_default="from the config, 16 bits each",
        ),
    ] = None,
    other: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="SIZE",
            help="What vLLM takes on each GPU beside weights and cache; it measures this at "
            "startup, and more --max-num-batched-tokens take more.",
            show_default=readable(OTHER_BYTES),
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0, max=1, help="As given to vLLM.")
    ] = UTILIZATION,
    sink: SinkOfMask = None,
    recent: RecentOfMask = None,
    prefill: Annotated[str, typer.Option(help="How prompts are read: exact or pruned.")] = "exact",
    pages: Pages = None,
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            max=MOST,
            help=f"As given to vLLM: tokens of a step; {STEPS_AT_ONCE} steps overlap. Decides what "
            "requests hold while their prompts are read pruned.",
            show_default=f"{BATCHED_TOKENS:,}, vLLM's on an H100 or H200",
        ),
    ] = BATCHED_TOKENS,
    tp: Annotated[
        int,
        typer.Option(
            "--tp",
            "--tensor-parallel-size",
            min=1,
            max=_MOST_GPUS,
            help="Tensor-parallel GPUs.",
        ),
    ] = 1,
    hf_overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How many requests fit: vLLM's dense cache in 16 and 8 bits, and leank's.

    Computed from the same pages that a server uses. With --kv-cache-memory what runs at once is
    exactly what its startup report says, which speaks of 32,768 tokens where --max-model-len is
    more; with --gpu-memory it is an estimate, as only vLLM can measure what it takes itself.

    Exit code 1 where not even one request fits with leank.
    """
    if (gpu_memory is None) == (kv_cache_memory is None):
        raise UserError("give either --gpu-memory or --kv-cache-memory")
    from vllm_leank.core.options import KEY, parse_options
    from vllm_leank.core.selection import whole_or_share
    from vllm_leank.mask.checkpoint import Checkpoint

    if mask is None or model or model_option:
        model = one_model(model, model_option, "leank plan MODEL, or its mask by --mask")
    if model is None and hf_overrides:
        raise UserError(
            "--hf-overrides changes a model's config, and none is read: name MODEL, or leave it out"
        )
    checkpoint = None if model is None else Checkpoint.open(model, overrides=hf_overrides)
    read = whole_or_share(pages)
    options = parse_options(
        {KEY: {"sink": sink, "recent": recent, "prefill": prefill, "pages": read}}
    )
    config = None if checkpoint is None else checkpoint.plain or checkpoint.config
    kind = None if config is None else other_layers(config)
    if reason := refused_prefill(kind, prefill):
        raise UserError(reason)
    if bits is not None and mask is not None:
        raise UserError("--bits and --mask exclude each other: give one")
    if bits is None:
        found = _mask(checkpoint, mask)
    else:
        assert checkpoint is not None
        from vllm_leank.offline.even_bits import even_mask

        found = even_mask(checkpoint.id, checkpoint.geometry, bits)
    # A directory, also where its config.json was named.
    model = found.model if checkpoint is None else checkpoint.path
    settings = _settings(checkpoint, found, options, tp)
    facts: dict[str, Any] = {
        "model": model,
        "model_read": checkpoint is not None,
        "mask": {"path": str(found.path), "sha256": found.sha256} if bits is None else None,
        "bits": found.bits,
        "window": {"sink": settings.window.sink, "recent": settings.window.recent},
        "prefill": prefill,
        "other_layers": kind,
        "hf_overrides": hf_overrides,
        "bits_asked": bits,
        "options": {
            "sink": sink,
            "recent": recent,
            "prefill": None if prefill == "exact" else prefill,
            "pages": read,
        },
        "kv_bytes_given": kv_cache_memory,
        "max_num_batched_tokens": max_num_batched_tokens,
        "tensor_parallel_size": tp,
        "max_model_len": max_model_len,
        "longest_request": None
        if checkpoint is None
        else longest_request(fields_of(config), checkpoint.geometry.rope_scaling),
    }
    pool = kv_cache_memory
    if gpu_memory is not None:
        if weights is None:
            if checkpoint is None:
                raise UserError("--gpu-memory needs MODEL, or the size of its --weights")
            weights = _weights(checkpoint)
        other = OTHER_BYTES if other is None else other
        pool = estimate_pool(gpu_memory, gpu_memory_utilization, weights // tp, other)
        facts |= {"gpu_bytes": gpu_memory, "weight_bytes": weights, "other_bytes": other}
    assert pool is not None
    if pool <= 0:
        raise UserError("no memory is left for the cache: give more by --kv-cache-memory")
    if not settings.window.exact:
        facts["while_computed"] = pruned_prefill(
            settings.plan, settings.window, pool, max_model_len, max_num_batched_tokens,
            STEPS_AT_ONCE,
        )  # fmt: skip
    capacities = compare(
        settings.plan, settings.window, pool, max_model_len,
        STEPS_AT_ONCE * max_num_batched_tokens, settings.selection,
    )  # fmt: skip
    line = serve_line(facts, mask, gpu_memory_utilization)
    print_plan(capacities, facts | {"pool_bytes": pool, "serve": line}, as_json)
    raise typer.Exit(0 if capacities["leank"].in_prefill >= 1 else 1)


def _mask(checkpoint: "Checkpoint | None", mask: str | None) -> "Mask":
    from vllm_leank.mask.errors import MaskError
    from vllm_leank.mask.file import load_mask
    from vllm_leank.mask.lookup import resolve_mask

    if checkpoint is None:
        return load_mask(str(mask))
    try:
        return resolve_mask(mask, checkpoint.path, checkpoint.geometry)
    except MaskError as error:
        if mask is not None:
            raise
        raise UserError(f"{error}\nor plan without a mask: --bits 2") from error


def _settings(
    checkpoint: "Checkpoint | None", mask: "Mask", options: "Options", tp: int
) -> "Settings":
    from vllm_leank.mask.settings import plan_settings

    heads = mask.geometry.num_kv_heads
    if heads % tp and tp % heads:
        raise UserError(f"--tp is {tp}, which neither divides {heads} KV heads nor is a multiple")
    if checkpoint is not None:
        config = checkpoint.plain or checkpoint.config
        queries = fields_of(config)("num_attention_heads")
        if queries % tp:
            raise UserError(
                f"--tp is {tp}, which does not divide {queries} query heads: vLLM would refuse it; "
                "give a number that does"
            )
        sliding, states = sliding_layers(config), state_layers(config, _ITEMSIZE, tp)
        return plan_settings(mask, options, _ITEMSIZE, tp, sliding=sliding, states=states)
    if mask.geometry.served_layers is not None:
        raise UserError("other layers than those of the mask take memory as well: give MODEL")
    return plan_settings(mask, options, _ITEMSIZE, tp)


def _weights(checkpoint: "Checkpoint") -> int:
    try:
        return checkpoint.weight_bytes(_ITEMSIZE)
    except UserError as error:
        raise UserError(f"{error}; give it with --weights") from None
