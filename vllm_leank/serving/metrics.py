"""What leank adds to vLLM's Prometheus metrics: which mask serves, and what its cache holds.

Those of `publish` are constant while a server runs, those of `_usage` follow its requests. Names
begin with `vllm:`, so that vLLM removes them together with its own when it begins anew.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_leank.core.capacity import Capacity, dense_capacity, leank_capacity
from vllm_leank.mask.settings import Settings
from vllm_leank.serving.settings import load_settings
from vllm_leank.serving.vllm.config import in_flight_tokens
from vllm_leank.serving.vllm.statistics import Observe

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Labels = Mapping[str, str]


def publish(vllm_config: "VllmConfig", stat_logger: Any) -> Observe:
    """Set the gauges of a server whose cache has its size.

    Args:
        vllm_config: the server's config.
        stat_logger: vLLM's Prometheus logger, which has the metric classes to use and the numbers
            of the server's engines.

    Returns:
        What takes the counts of `Usage.count` and the engine's number.
    """
    settings = load_settings(vllm_config)
    model = vllm_config.model_config
    own = {"model_name": str(model.served_model_name)}

    def gauge(name: str, documentation: str, values: list[tuple[Labels, float]]) -> None:
        made = stat_logger._gauge_cls(
            name=f"vllm:leank_{name}",
            documentation=documentation,
            labelnames=[*own, *values[0][0]],
            multiprocess_mode="mostrecent",
        )
        for labels, value in values:
            made.labels(**own, **labels).set(value)

    plan = settings.plan
    engines = [{"engine": str(index)} for index in stat_logger.engine_indexes]
    # vLLM adds up the blocks of all data-parallel replicas.
    blocks = (vllm_config.cache_config.num_gpu_blocks or 0) // len(engines)
    pool = blocks * plan.block_bytes
    length = model.max_model_len
    caches = {
        "leank": leank_capacity(plan, settings.window, pool, length, in_flight_tokens(vllm_config)),
        "dense": dense_capacity(plan, pool, length),
    }
    gauge("mask_info", "The mask and the window in use.", [(_info(settings), 1)])
    gauge(
        "cache_bytes",
        "Bytes of the KV cache on each tensor-parallel rank of an engine.",
        [(engine, pool) for engine in engines],
    )
    gauge(
        "far_token_bytes",
        "Bytes of a token outside the dense window on each rank, with leank and without it.",
        [({"cache": name}, cache.far_token_bytes) for name, cache in caches.items()],
    )
    gauge(
        "request_capacity",
        "Requests of the longest length that an engine's cache holds, with leank and without it: "
        "in decode, in prefill, or one in prefill while all others decode.",
        [
            ({**engine, **labels}, value)
            for engine in engines
            for name, cache in caches.items()
            for labels, value in _capacity(name, cache)
        ],
    )
    return _usage(own, stat_logger)


def _usage(own: Labels, stat_logger: Any) -> Observe:
    """Metrics of what requests hold, zero at first, and what sets them."""
    labels = [*own, "engine"]
    tokens = stat_logger._gauge_cls(
        name="vllm:leank_tokens",
        documentation="Tokens of running requests in archive pages, and dense in window pages.",
        labelnames=[*labels, "pages"],
        multiprocess_mode="mostrecent",
    )
    saved = stat_logger._gauge_cls(
        name="vllm:leank_saved_bytes",
        documentation=(
            "Bytes that running requests hold less than in a dense cache, on each tensor-parallel "
            "rank. Below 0 while prompts are computed, which hold dense and archive pages."
        ),
        labelnames=labels,
        multiprocess_mode="mostrecent",
    )
    compacted = stat_logger._counter_cls(
        name="vllm:leank_compacted_tokens",
        documentation="Tokens given a place in the archive, replayed ones again.",
        labelnames=labels,
    )

    def observe(usage: Mapping[str, int], engine: int) -> None:
        labels = {**own, "engine": str(engine)}
        for pages in ("archive", "window"):
            tokens.labels(**labels, pages=pages).set(usage[pages])
        saved.labels(**labels).set(usage["saved"])
        compacted.labels(**labels).inc(usage["compacted"])

    for engine in stat_logger.engine_indexes:
        observe(dict.fromkeys(("archive", "window", "saved", "compacted"), 0), engine)
    return observe


def _info(settings: Settings) -> dict[str, str]:
    mask, window = settings.mask, settings.window
    return {
        "mask": mask.model,
        "sha256": mask.sha256 or "",
        "method": str(mask.provenance["method"]),
        "k_kept": f"{mask.k_kept:.4f}",
        "v_kept": f"{mask.v_kept:.4f}",
        "sink": str(window.sink),
        "recent": str(window.recent),
        "archive_format": settings.plan.archive_format.name,
        "prefill": "exact" if window.exact else "pruned",
    }


def _capacity(name: str, cache: Capacity) -> list[tuple[Labels, float]]:
    return [
        ({"cache": name, "phase": "decode"}, cache.in_decode),
        ({"cache": name, "phase": "prefill"}, cache.in_prefill),
        ({"cache": name, "phase": "both"}, cache.at_once),
    ]
