"""The startup report: which mask serves, and how many requests fit against dense."""

from collections import Counter
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_leank.core.capacity import dense_capacity, leank_capacity, pruned_prefill
from vllm_leank.core.pages import LEAST_BLOCK
from vllm_leank.errors import printable
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.settings import Settings
from vllm_leank.serving.environment import installed_at
from vllm_leank.serving.settings import load_settings
from vllm_leank.serving.vllm.config import in_flight_tokens
from vllm_leank.version import __version__

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.leank.report")

BEYOND = 1.1
"""Requests may be so many times as long as the prompts a mask was made from, without a warning."""

LONG_REQUEST = 32_768
"""Tokens of the request that capacity is stated for, where the model takes as many."""


def log_capacity(vllm_config: "VllmConfig", num_blocks: int) -> None:
    """Log the report when the cache's size is known; on the first rank only."""
    settings = load_settings(vllm_config)
    longest = vllm_config.model_config.max_model_len
    # vLLM tries CUDA graphs with a small pool first; a real one holds a request of full length.
    in_flight = in_flight_tokens(vllm_config)
    needed = settings.plan.blocks_in_prefill(settings.window, longest, in_flight)
    is_trial = num_blocks < needed
    if is_trial or vllm_config.parallel_config.rank != 0:
        return
    logger.info("leank version: %s, %s", __version__, installed_at())
    length = min(LONG_REQUEST, longest)
    for line in report(settings, num_blocks, length):
        logger.info("%s", line)
    if not settings.window.exact:
        step = vllm_config.scheduler_config.max_num_batched_tokens
        pool = num_blocks * settings.plan.block_bytes
        prefill = pruned_prefill(
            settings.plan, settings.window, pool, length, step, in_flight // step
        )
        logger.info("leank capacity: %s", prefill)
    for warning in warnings_of(settings.mask, longest):
        logger.warning("%s", warning)


def report(settings: Settings, num_blocks: int, length: int) -> list[str]:
    """The report's lines.

    Args:
        settings: mask, window and page sizes.
        num_blocks: blocks of vLLM's pool.
        length: tokens of the request that capacity is stated for.
    """
    plan = settings.plan
    pool = num_blocks * plan.block_bytes
    fit = leank_capacity(plan, settings.window, pool, length).at_once
    dense = dense_capacity(plan, pool, length).at_once
    return [
        *describe(settings),
        f"leank capacity: {fit:.1f} requests of {length:,} tokens at once, {dense:.1f} dense "
        f"({fit / dense:.2f}x), in {pool / 2**30:.2f} GiB",
    ]


def describe(settings: Settings) -> list[str]:
    """The lines that need no pool: mask, window and pages."""
    mask, window, plan = settings.mask, settings.window, settings.plan
    made_for = ""
    if (mask.sink, mask.recent) != (window.sink, window.recent):
        made_for = f" (the mask was made for {mask.sink} and {mask.recent})"
    kind = plan.archive_format.archive
    archive, full = plan.archive_token_bytes, plan.dense_token_bytes
    longer = f", window pages of {plan.window_block}" if plan.window_block > LEAST_BLOCK else ""
    return [
        *_layers(settings),
        f"leank mask: {mask.model}, {printable(mask.provenance['method'])}, "
        f"sha256 {mask.sha256[:12]}, {printable(str(mask.path))}",
        f"leank mask: {_kept(mask)}",
        f"leank window: sink {window.sink}, recent {window.recent} tokens dense{made_for}"
        + ("" if window.exact else "; prompts are read pruned"),
        *_selection(settings),
        f"leank cache: {archive:,} bytes per far token against {full:,} dense "
        f"({archive / full:.1%}); {kind} pages of {plan.archive_block} tokens{longer}",
    ]


def warnings_of(mask: Mask, max_model_len: int | None) -> list[str]:
    """What speaks against a mask: that it was judged and failed, or that requests may be longer
    than any prompt that it was made from.
    """
    found = []
    verdict = (mask.evaluation or {}).get("verify")
    if isinstance(verdict, str) and verdict.startswith("FAIL"):
        found.append(
            f"leank mask: it failed `leank verify`, as its file says ({printable(verdict)}). Judge "
            "it on your model by `leank verify`, or make one that keeps more by `leank mask "
            "calibrate`"
        )
    longest = mask.provenance.get("longest_prompt")
    length = max_model_len or 0
    if isinstance(longest, int) and length > BEYOND * longest:
        found.append(
            f"leank mask: made from prompts of up to {longest:,} tokens, but requests may have "
            f"{length:,}: answers of longer ones may be worse than measured. Calibrate with "
            f"--max-tokens {length}, or serve with --max-model-len {longest}"
        )
    return found


def _selection(settings: Settings) -> list[str]:
    """What queries read of far tokens, where it is not all."""
    return [] if settings.selection is None else [f"leank pages: {settings.selection}"]


def _layers(settings: Settings) -> list[str]:
    """Which layers are served, where some are not."""
    geometry, sliding, states = settings.mask.geometry, settings.plan.sliding, settings.plan.states
    served = (
        f"leank layers: serves {len(geometry.layers)} of {geometry.num_layers} layers, those with "
        "full attention; "
    )
    lines = []
    if sliding is not None:
        lines.append(
            f"{served}{sliding.count} sliding layers stay vLLM's, with the last "
            f"{sliding.window:,} tokens"
        )
    if states is not None:
        lines.append(
            f"{served}the states of {states.count} layers stay vLLM's, {states.state_bytes:,} "
            "bytes of each layer and request"
        )
    return lines


def _kept(mask: Mask) -> str:
    """What far tokens keep, over all and by head."""
    counts = mask.kept_counts
    heads = (
        f"of {counts.size:,} heads of {mask.geometry.head_dim} channels in "
        f"{len(mask.geometry.layers)} layers"
    )
    if mask.is_packed:
        profiles = Counter(profile for layer in mask.profiles for profile in layer)
        each = "; ".join(f"{profiles[one]} store {one}" for one in sorted(profiles))
        return f"{mask.bits:.1f} bits per number ({16 / mask.bits:.1f}x), {heads} {each}"
    kept = Counter(int(count) for count in counts.flat)
    each = ", ".join(f"{kept[count]} keep {count}" for count in sorted(kept))
    return f"{mask.k_kept:.1%} of K and {mask.v_kept:.1%} of V kept; {heads} {each}"
