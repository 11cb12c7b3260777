"""Runs engines of one model one after the other, with and without leank, under the same load."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_leank.bench.machine import require_gpu
from vllm_leank.core.capacity import EIGHT_BIT_CACHE
from vllm_leank.errors import UserError
from vllm_leank.version import SUPPORTED_VLLM

DEFAULT_VARIANTS = "flash", f"flash-{EIGHT_BIT_CACHE}", "leank"
"""vLLM's FlashAttention in the model's dtype and in 8-bit floats, and leank."""

OTHER_CACHES = "int4_per_token_head", "turboquant_4bit_nc"
"""vLLM's caches of 4 bits, which bring attention of their own: `kv_cache_dtype`."""

VARIANTS = (*DEFAULT_VARIANTS, "leank-pruned", *OTHER_CACHES)
"""All there are: leank may read prompts pruned as well."""

STDERR = 2
"""File descriptor: stdout is for results."""


def require_vllm() -> None:
    """Refuse to start where there is no vLLM.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"leank bench serve runs engines of vLLM: pip install 'vllm{SUPPORTED_VLLM}'"
        )


def parse_variants(text: str) -> list[str]:
    """Variants from `flash,leank`.

    Raises:
        UserError: one of them is unknown, or not for this machine.
    """
    variants = [part.strip() for part in text.split(",")]
    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f"--variants has {variant!r}; allowed: {', '.join(VARIANTS)}")
        if variant in OTHER_CACHES:
            # On a CPU vLLM takes these names, too, but makes them 8-bit floats.
            require_gpu(f"--variants {variant}")
    return variants


def variant_args(variant: str, leank: dict[str, Any]) -> dict[str, Any]:
    """The engine arguments in which a variant differs; `leank` are leank's options."""
    if variant in OTHER_CACHES:
        return {"kv_cache_dtype": variant}
    backend, *words = variant.split("-")
    if backend == "flash":
        cache = {"kv_cache_dtype": words[0]} if words else {}
        return {"attention_backend": "FLASH_ATTN"} | cache
    options = dict(leank)
    if words:
        options["prefill"] = words[0]
    return {"attention_backend": "leank", "additional_config": {"leank": options}}


def refuse_args_of_variants(arguments: dict[str, Any]) -> None:
    """Refuse engine arguments that variants set, as they would be replaced, and another model than
    results would name.

    Raises:
        UserError: there are some.
    """
    of_variants = "attention_backend", "kv_cache_dtype", "additional_config"
    if found := [name for name in of_variants if name in arguments]:
        raise UserError(
            f"--engine-args has {', '.join(found)}, which --variants, --mask, --sink, --recent and "
            "--pages set"
        )
    if "model" in arguments:
        raise UserError("--engine-args has model; give it as the command's own argument, MODEL")


def parse_engine_args(text: str | None) -> dict[str, Any]:
    """More engine arguments, from a JSON object.

    Raises:
        UserError: not a JSON object.
    """
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"--engine-args is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError('--engine-args is not a JSON object such as {"max_num_seqs": 64}')
    return value


def run_variant(variant: str, run: dict[str, Any]) -> dict[str, Any]:
    """Figures of a variant, measured in a process of its own, whose log goes to stderr.

    Args:
        variant: its name, for messages.
        run: the fields of `engine_run.Run`.

    Raises:
        UserError: the engine did not start, or gave nothing that can be reported.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "run.json"), Path(folder, "result.json")
        source.write_text(json.dumps(run), encoding="utf-8")
        # -P: the working directory, which may be a checkout, is no place to import from.
        command = [sys.executable, "-P", "-m", "vllm_leank.bench.engine_run"]
        done = subprocess.run([*command, source, target], stdout=STDERR, check=False)
        if done.returncode or not target.exists():
            raise UserError(
                f"{variant}: the engine ended with exit code {done.returncode}; its log is above"
            )
        result: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    if "error" in result:
        raise UserError(f"{variant}: {result['error']}")
    # On a CPU vLLM takes its own attention, whatever is asked for.
    on_cpu = result.pop("device_type", None) == "cpu"
    return {"variant": variant.replace("flash", "cpu") if on_cpu else variant} | result


def ratios(variants: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each variant against the first: requests, tokens per second, times to first and per token;
    None of first tokens that were not timed.
    """
    first = variants[0]
    return [
        {
            "variant": one["variant"],
            "against": first["variant"],
            "concurrent": one["concurrent"] / first["concurrent"],
            "tokens_per_s": one["decode"]["tokens_per_s"] / first["decode"]["tokens_per_s"],
            "ttft": None
            if one["ttft_s"]["median"] is None
            else one["ttft_s"]["median"] / first["ttft_s"]["median"],
            "tpot_p50": one["decode"]["tpot_p50_ms"] / first["decode"]["tpot_p50_ms"],
        }
        for one in variants[1:]
    ]
