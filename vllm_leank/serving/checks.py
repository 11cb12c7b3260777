"""What leank refuses at startup: each with what, why, and the flag to change."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import vllm.envs as envs

from vllm_leank.core.capacity import EIGHT_BIT_CACHE
from vllm_leank.core.options import (
    KEY,
    OptionError,
    Options,
    given_options,
    misplaced,
    read_options,
)
from vllm_leank.core.other_layers import (
    NO_PREFIX_CACHING,
    STATES,
    other_layers,
    refused_prefill,
)
from vllm_leank.core.served_models import Attention, is_latent, unshown
from vllm_leank.core.states import keeps_states
from vllm_leank.errors import UserError
from vllm_leank.serving.flags import refused_flags
from vllm_leank.serving.last_word import say_it_last
from vllm_leank.serving.vllm.backend_name import is_selected
from vllm_leank.serving.vllm.config import cache_dtype
from vllm_leank.serving.vllm.draft_model import draft_with, has_draft, is_draft
from vllm_leank.serving.vllm.prompt_lengths import request_prompt_lengths
from vllm_leank.serving.vllm.states import hook_states
from vllm_leank.serving.vllm.statistics import hook_metrics
from vllm_leank.serving.vllm.streaming_input import refuse_streaming_input

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from vllm_leank.mask.settings import Settings

LEAST_CAPABILITY = (8, 0)
"""Of a GPU, whatever the archive holds: Ampere."""

LAYOUT = "BLHNC"
"""How vLLM lays out the cache: blocks outermost."""

DRAFTERS = ("ngram", "ngram_gpu", "suffix", "draft_model")
"""Speculative methods that take their drafts from text, or from a model of its own."""


class RefusalError(OptionError):
    """leank cannot serve `vllm_config`, for every one of `reasons`.

    `settings` are those that it would serve with, None where they cannot be told.
    """

    vllm_config: "VllmConfig"
    settings: "Settings | None"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Sentence parts that say what to change."""
        return self.args

    def __str__(self) -> str:
        return "leank cannot serve this: " + "; ".join(self.reasons)


def check_config(vllm_config: "VllmConfig") -> None:
    """Check a whole config, and prepare it for leank if leank is selected.

    Runs wherever a `VllmConfig` is made, first of all in the process that reads the command line,
    before any weights are loaded.

    Raises:
        RefusalError: leank cannot serve this config; the message lists every reason.
        OptionError: leank options are given, but leank is not selected.
    """
    if not is_selected(vllm_config):
        if given_options(vllm_config.additional_config):
            wrong = misplaced(vllm_config.additional_config)
            say_it_last()
            raise OptionError(
                "leank options are given, but leank is not selected: add "
                "--attention-backend leank, or remove them from --additional-config"
                + (f"; {wrong}" if wrong else "")
            )
        return
    if vllm_config.model_config is None or is_draft(vllm_config):
        return  # a draft model is checked with the served one
    settings, reasons = judge(vllm_config)
    if settings is None or reasons:
        refusal = RefusalError(*reasons)
        refusal.vllm_config, refusal.settings = vllm_config, settings
        say_it_last()
        raise refusal
    # Here, since every process that uses vLLM imports this module.
    from vllm_leank.serving.metrics import publish
    from vllm_leank.serving.settings import attach_settings

    attach_settings(vllm_config, settings)
    if settings.plan.states is not None:
        hook_states()
    if has_draft(vllm_config):
        draft_with(vllm_config, vllm_config.attention_config.backend)
    hook_metrics(publish)
    refuse_streaming_input()
    request_prompt_lengths(vllm_config)


def judge(vllm_config: "VllmConfig") -> "tuple[Settings | None, list[str]]":
    """What a config would be served with, None where that cannot be told, and every reason not to
    serve it: sentence parts that say what to change.
    """
    from vllm_leank.serving.settings import resolve_settings

    options, faults = read_options(vllm_config.additional_config)
    of_models = list(_models(vllm_config))
    reasons = [*faults.values(), *_platform(vllm_config), *of_models, *_flags(vllm_config)]
    if of_models or {KEY, "mask"} & faults.keys():
        return None, reasons  # a mask says nothing then
    reasons.extend(_mixed(vllm_config, options))
    try:
        settings = resolve_settings(vllm_config, options)
    except UserError as error:
        return None, [*reasons, str(error)]
    if "recent" not in faults:
        reasons.extend(_drafts(vllm_config, settings.window.recent))
    reasons.extend(_retention(vllm_config, settings))
    return None if faults else settings, reasons


def _models(vllm_config: "VllmConfig") -> Iterator[str]:
    """What the served model and its draft model have that cannot be served."""
    other = "serve this model without --attention-backend leank"
    runner = vllm_config.model_config.runner_type
    if runner != "generate":
        yield f"only text generation is supported, not --runner {runner}; {other}"
    yield from _attention(vllm_config.model_config).refusals(other)
    if has_draft(vllm_config):
        draft = vllm_config.speculative_config.draft_model_config
        other = "use another draft model in --speculative-config"
        reasons = list(_attention(draft).refusals(other))
        if not reasons and (kind := other_layers(draft.hf_text_config)):
            reasons = [f"a draft model with {kind} is not supported; {other}"]
        yield from reasons


def _platform(config: "VllmConfig") -> Iterator[str]:
    from vllm.platforms import current_platform

    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        yield f"it runs on NVIDIA GPUs and on CPU, not on {current_platform.device_name}"
    if current_platform.is_cuda() and not current_platform.has_device_capability(LEAST_CAPABILITY):
        yield "it needs a GPU of compute capability 8.0 or newer (Ampere)"
    if current_platform.is_cuda() and config.model_config.dtype.itemsize == 4:
        yield "on a GPU it computes in 16 bits: use --dtype bfloat16 or --dtype float16"


def _attention(model: "ModelConfig") -> Attention:
    """What vLLM says of a model's attention."""
    text = model.hf_text_config
    told = Attention.of(text)
    return Attention(
        model.get_head_size(),
        is_encoder_decoder=model.is_encoder_decoder,
        is_diffusion=model.is_diffusion,
        # Of some that have it, vLLM keeps what comes out of the latent.
        is_latent=model.use_mla or is_latent(text),
        is_state_space=told.is_state_space
        or model.is_attention_free
        or (model.is_hybrid and not keeps_states(text)),
        layers=told.layers,
        unshown=unshown(model.architectures),
        has_soft_cap=told.has_soft_cap,
        has_alibi=model.uses_alibi,
        sees_images_both_ways=model.is_mm_prefix_lm,
    )


def _mixed(config: "VllmConfig", options: Options) -> Iterator[str]:
    """What does not go together with sliding layers, or such that keep states, beside served
    ones.
    """
    if (kind := other_layers(config.model_config.hf_text_config)) is None:
        return
    if reason := refused_prefill(kind, options.prefill):
        yield reason
    if config.parallel_config.pipeline_parallel_size > 1:
        yield (
            f"pipeline parallelism is for models without {kind}: remove --pipeline-parallel-size"
        )
    if kind == STATES and config.speculative_config is not None:
        yield f"speculative decoding is for models without {kind}: remove --speculative-config"
    elif has_draft(config):
        yield (
            f"a draft model is for models without {kind}: use another method in "
            "--speculative-config"
        )
    if kind == STATES and config.cache_config.enable_prefix_caching:
        yield f"prefix caching is for models without {kind}: add {NO_PREFIX_CACHING}"


def _retention(config: "VllmConfig", settings: "Settings") -> Iterator[str]:
    """vLLM compares it with pages only when the model has been loaded."""
    if not (interval := config.cache_config.prefix_cache_retention_interval):
        return
    told = f"--prefix-cache-retention-interval is {interval}"
    pages = math.lcm(settings.plan.window_block, settings.plan.archive_block)
    if other_layers(config.model_config.hf_text_config) is None:
        yield f"{told}; it is for models with sliding layers: remove it"
    elif interval % pages:
        yield f"{told}; with this mask it must be 0 or a multiple of {pages}"


def _flags(config: "VllmConfig") -> Iterator[str]:
    cache = config.cache_config
    if config.attention_config.backend_per_kind:
        yield (
            "it chooses the layers that it serves: remove backend_per_kind from --attention-config "
            "and use --attention-backend leank"
        )
    if config.attention_config.flash_attn_version is not None:
        yield (
            "it reads prompts by FlashAttention 3 on Hopper and 2 elsewhere: remove "
            "flash_attn_version from --attention-config"
        )
    if config.load_config.load_format == "tensorizer":
        yield (
            "with --load-format tensorizer vLLM does not tell attention layers that their weights "
            "are there: use another load format"
        )
    if cache_dtype(config) != config.model_config.dtype:
        asked = "the checkpoint's own" if cache.cache_dtype == "auto" else cache.cache_dtype
        own = str(config.model_config.dtype).removeprefix("torch.")
        flag = "remove the flag" if own == "float32" else f"use --kv-cache-dtype {own}"
        if str(cache.cache_dtype).startswith(EIGHT_BIT_CACHE):
            flag += (
                "; far tokens of fewer bits are leank's own: make a mask of bits (leank mask "
                "calibrate MODEL --bits 2)"
            )
        yield f"a KV cache of another dtype than the model's ({asked}) is not supported: {flag}"
    if config.speculative_config is not None:
        yield from _speculation(config)
    yield from refused_flags(config)
    if envs.VLLM_KV_CACHE_LAYOUT not in (None, LAYOUT):
        yield f"its pages lie as {LAYOUT}: unset VLLM_KV_CACHE_LAYOUT"
    if envs.VLLM_BATCH_INVARIANT:
        yield "batch-invariant mode is not supported: unset VLLM_BATCH_INVARIANT"


def _speculation(config: "VllmConfig") -> Iterator[str]:
    speculation = config.speculative_config
    if speculation.method not in DRAFTERS:
        yield (
            f"the speculative method {speculation.method} drafts with layers that go on from the "
            f"served model's, which is not supported: use one of {', '.join(DRAFTERS)} in "
            "--speculative-config"
        )
    own = config.attention_config.backend
    if speculation.attention_backend not in (None, own) or speculation.kv_cache_dtype:
        yield (
            "a draft model's pages lie beside the served model's: remove attention_backend and "
            "kv_cache_dtype from --speculative-config"
        )
    if getattr(speculation, "enable_adaptive_verification", False):
        yield (
            "how many drafts are checked must be known on the host: remove "
            "enable_adaptive_verification from --speculative-config"
        )


def _drafts(config: "VllmConfig", recent: int) -> Iterator[str]:
    """Drafts that may be rejected must not leave the dense window in the step that checks them."""
    speculation = config.speculative_config
    if speculation is not None and (drafts := speculation.num_speculative_tokens) > recent:
        yield (
            f"leank option recent is {recent}, but must be at least the {drafts} of "
            "num_speculative_tokens: drafts must stay in the dense window"
        )
