"""What a `vllm serve` line would do, told without starting it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_leank.core.capacity import estimate_pool
from vllm_leank.errors import UserError
from vllm_leank.mask.settings import Settings
from vllm_leank.serving.checks import RefusalError
from vllm_leank.serving.line import cause_of, parse_words, reason_of, serve_words
from vllm_leank.serving.settings import load_settings
from vllm_leank.serving.vllm.backend_name import is_selected
from vllm_leank.serving.vllm.config import in_flight_tokens

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Serving:
    """What a `vllm serve` line would do.

    Attributes:
        reasons: why it would not be served by leank; none if it would.
        settings: mask, window and plan; None where they cannot be told.
        pool_bytes: bytes of the cache on each tensor-parallel rank, over its pipeline stages; an
            estimate unless set; None where unknown.
        length: longest request; None where no config could be made.
        in_flight: tokens that are computed at once, at most.
    """

    reasons: tuple[str, ...]
    settings: Settings | None = None
    pool_bytes: int | None = None
    length: int | None = None
    in_flight: int = 1


def examine(arguments: Sequence[str]) -> Serving:
    """Read a `vllm serve` line as vLLM does, up to its config; nothing is loaded or started.

    `arguments` may begin with `vllm serve` or with what follows it.
    """
    try:
        config = _parse(arguments)
    except Exception as error:
        return _refused(error)
    if not is_selected(config):
        return Serving(("leank is not selected: add --attention-backend leank",))
    return _serving((), config, load_settings(config))


def _parse(arguments: Sequence[str]) -> "VllmConfig":
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    engine = AsyncEngineArgs.from_cli_args(parse_words(serve_words(arguments)))
    return engine.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def _refused(error: Exception) -> Serving:
    """Every reason, and mask and plan all the same where they can be told."""
    refusal = cause_of(error)
    if not isinstance(refusal, RefusalError):
        return Serving((reason_of(error),))
    if refusal.settings is None:
        return Serving(refusal.reasons)
    return _serving(refusal.reasons, refusal.vllm_config, refusal.settings)


def _serving(reasons: tuple[str, ...], config: "VllmConfig", settings: Settings) -> Serving:
    length, in_flight = config.model_config.max_model_len, in_flight_tokens(config)
    pool, plan = _pool(config), settings.plan
    # One block is vLLM's own.
    needed = (1 + plan.blocks_in_prefill(settings.window, length, in_flight)) * plan.block_bytes
    is_given = bool(config.cache_config.kv_cache_memory_bytes)
    is_fitted = config.model_config.original_max_model_len == -1  # by vLLM, to the pool
    if pool and pool < needed and is_given and not is_fitted:
        too_small = (
            f"a request of {length:,} tokens needs {needed:,} bytes while its prompt is computed, "
            "or vLLM does not start: raise --kv-cache-memory-bytes or lower --max-model-len"
        )
        reasons = (*reasons, too_small)
    return Serving(reasons, settings, pool, length, in_flight)


def _pool(config: "VllmConfig") -> int | None:
    """Bytes of the cache on each tensor-parallel rank, over its pipeline stages, as set or
    estimated.
    """
    from vllm.platforms import current_platform

    from vllm_leank.mask.checkpoint import Checkpoint

    cache, model, parallel = config.cache_config, config.model_config, config.parallel_config
    stages = parallel.pipeline_parallel_size
    if cache.kv_cache_memory_bytes:
        return stages * int(cache.kv_cache_memory_bytes)
    if not current_platform.is_cuda():
        return None
    try:
        weights = Checkpoint.open(model.model).weight_bytes(model.dtype.itemsize)
        return stages * estimate_pool(
            current_platform.get_device_total_memory(),
            cache.gpu_memory_utilization,
            weights // (parallel.tensor_parallel_size * stages),
        )
    except UserError:
        return None
