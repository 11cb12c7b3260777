"""How many requests fit into a cache: leank's against dense ones, from the same bytes."""

from dataclasses import dataclass, replace

from vllm_leank.core.plan import CachePlan
from vllm_leank.core.reads import step_reads
from vllm_leank.core.selection import Selection
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError

UTILIZATION = 0.92
"""vLLM's default of `--gpu-memory-utilization`."""

OTHER_BYTES = 3 * 2**30
"""What vLLM takes beside weights and cache: activations and CUDA graphs of an 8B model at vLLM's
defaults on an H200. vLLM measures it at startup; here it is a guess.
"""

BATCHED_TOKENS = 8192
"""vLLM's default of `--max-num-batched-tokens` for servers on an H100 or H200."""

EIGHT_BIT_CACHE = "fp8"
"""What vLLM's flag `--kv-cache-dtype` calls its own cache of 8-bit floats."""

LEAST_STEP = 512
"""Tokens of a step below which prompts are computed slowly; fewer are not advised."""

STEPS_AT_ONCE = 2
"""Steps of a server that overlap, without pipeline parallelism."""


@dataclass(frozen=True)
class Capacity:
    """What one way to keep the cache makes of a pool, on each rank.

    Attributes:
        far_token_bytes: bytes of a token outside the dense window, over all layers.
        archive_block: tokens of an archive page; None for dense caches.
        block_bytes: bytes of a block of the pool; None for dense caches, where it is an option.
        in_decode: requests that fit once their prompts are done, not rounded.
        in_prefill: requests that fit while their prompts are computed, not rounded.
        at_once: requests of long prompts that come to run at once, not rounded: the last one's
            prompt is computed while the others decode.
        step_bytes: what a decode step reads of a request; None: it was not asked for.
        window_block: tokens of a window page; None for dense caches.
    """

    far_token_bytes: int
    archive_block: int | None
    block_bytes: int | None
    in_decode: float
    in_prefill: float
    at_once: float
    step_bytes: int | None = None
    window_block: int | None = None


def leank_capacity(
    plan: CachePlan, window: Window, pool_bytes: int, length: int, in_flight: int = 1
) -> Capacity:
    """Capacity of leank for requests of `length` tokens, `in_flight` of which are computed at once
    while they are prompts.
    """
    blocks = pool_bytes // plan.block_bytes
    in_decode = plan.blocks_in_decode(window, length)
    in_prefill = plan.blocks_in_prefill(window, length, in_flight)
    one, left = min(blocks / in_prefill, 1), max(blocks - in_prefill, 0)
    return Capacity(
        far_token_bytes=plan.archive_token_bytes,
        archive_block=plan.archive_block,
        block_bytes=plan.block_bytes,
        in_decode=blocks / in_decode,
        in_prefill=blocks / in_prefill,
        at_once=one + left / in_decode,
        window_block=plan.window_block,
    )


def dense_capacity(
    plan: CachePlan, pool_bytes: int, length: int, itemsize: int | None = None
) -> Capacity:
    """Capacity of vLLM without leank for requests of `length` tokens.

    `itemsize` is the bytes of an element, by default those of the plan's window pages.
    """
    dense = replace(plan, itemsize=itemsize or plan.itemsize)
    token_bytes = dense.dense_token_bytes
    held = token_bytes * length + dense.other_bytes(length)
    requests = pool_bytes / held
    # All that is held is read, and a prompt holds no more than what is said after it.
    return Capacity(token_bytes, None, None, requests, requests, requests, held)


def compare(
    plan: CachePlan,
    window: Window,
    pool_bytes: int,
    length: int,
    in_flight: int,
    selection: Selection | None = None,
) -> dict[str, Capacity]:
    """Capacity of dense caches and of leank's, by name, and what a step reads; see
    `leank_capacity` and `step_reads`.
    """
    leank = leank_capacity(plan, window, pool_bytes, length, in_flight)
    reads = step_reads(plan, window, length, selection)
    return {
        "vLLM": dense_capacity(plan, pool_bytes, length),
        f"vLLM, {EIGHT_BIT_CACHE} cache": dense_capacity(plan, pool_bytes, length, itemsize=1),
        "leank": replace(leank, step_bytes=reads.total),
    }


def pruned_prefill(
    plan: CachePlan, window: Window, pool_bytes: int, length: int, step_tokens: int, steps: int
) -> str:
    """A sentence part on prompts of `length` tokens that are read pruned: how many fit while they
    are computed, what the tokens in flight take of that, and what to set where it is much.

    Tokens that are scheduled and not yet computed are dense, in every request that vLLM counts: up
    to `steps` steps of `step_tokens`, vLLM's `--max-num-batched-tokens`.
    """

    def fitting(tokens: int) -> float:
        return leank_capacity(plan, window, pool_bytes, length, steps * tokens).in_prefill

    dense = window.most_dense(length, steps * step_tokens)
    said = (
        f"{fitting(step_tokens):,.1f} requests of {length:,} tokens fit while prompts are "
        f"computed, which vLLM's own line counts: each may hold {dense:,} tokens dense, as "
        f"--max-num-batched-tokens {step_tokens:,} puts up to {steps * step_tokens:,} in flight"
    )
    halves = (1 << exponent for exponent in range((step_tokens - 1).bit_length() - 1, 0, -1))
    fewer = [tokens for tokens in halves if tokens >= LEAST_STEP]
    enough = 0.8 * fitting(LEAST_STEP)
    if not fewer or fitting(step_tokens) >= enough:
        return said
    advised = next(tokens for tokens in fewer if fitting(tokens) >= enough)
    return f"{said}; with --max-num-batched-tokens {advised}, {fitting(advised):,.1f} fit"


def estimate_pool(
    gpu_bytes: int, utilization: float, weight_bytes: int, other_bytes: int = OTHER_BYTES
) -> int:
    """Bytes that vLLM has left for the cache of one GPU.

    Args:
        gpu_bytes: the GPU's memory.
        utilization: share of it that vLLM may use.
        weight_bytes: weights on this GPU.
        other_bytes: what else vLLM takes.

    Raises:
        UserError: nothing is left.
    """
    pool = int(gpu_bytes * utilization) - weight_bytes - other_bytes
    if pool <= 0:
        raise UserError(
            f"no memory is left for the cache: {utilization:.0%} of {gpu_bytes / 2**30:.2f} GiB "
            f"is less than weights ({weight_bytes / 2**30:.2f} GiB) and what else vLLM takes "
            f"({other_bytes / 2**30:.2f} GiB); check --gpu-memory, --gpu-memory-utilization, "
            "--weights and --other, or share the weights among more GPUs by --tp"
        )
    return pool
