"""What leank adds to vLLM's Prometheus metrics: which mask serves, and what its cache holds.

All are constant while a server runs. What is in use follows from vLLM's own gauges, as in
`vllm:kv_cache_usage_perc * vllm:leank_cache_bytes`. Names begin with `vllm:`, so that vLLM removes
them together with its own when it begins anew.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm_leank.capacity import Capacity, dense_capacity, leank_capacity
from vllm_leank.settings import Settings, load_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Labels = Mapping[str, str]


def publish(vllm_config: "VllmConfig", make_gauge: Callable[..., Any]) -> None:
    """Set the gauges of a server whose cache has its size.

    `make_gauge` makes a gauge from `name`, `documentation`, `labelnames` and `multiprocess_mode`.
    """
    settings = load_settings(vllm_config)
    model = vllm_config.model_config
    own = {"model_name": str(model.served_model_name)}

    def gauge(name: str, documentation: str, values: list[tuple[Labels, float]]) -> None:
        made = make_gauge(
            name=f"vllm:leank_{name}",
            documentation=documentation,
            labelnames=[*own, *values[0][0]],
            multiprocess_mode="mostrecent",
        )
        for labels, value in values:
            made.labels(**own, **labels).set(value)

    plan = settings.plan
    pool = (vllm_config.cache_config.num_gpu_blocks or 0) * plan.block_bytes
    length = model.max_model_len
    caches = {
        "leank": leank_capacity(plan, settings.window, pool, length),
        "dense": dense_capacity(plan, pool, length),
    }
    gauge("mask_info", "The mask and the window in use.", [(_info(settings), 1)])
    gauge("cache_bytes", "Bytes of the KV cache on each rank, over all engines.", [({}, pool)])
    gauge(
        "far_token_bytes",
        "Bytes of a token outside the dense window on each rank, with leank and without it.",
        [({"cache": name}, cache.far_token_bytes) for name, cache in caches.items()],
    )
    gauge(
        "request_capacity",
        "Requests of the longest length that the cache holds, with leank and without it.",
        [entry for name, cache in caches.items() for entry in _capacity(name, cache)],
    )


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
        "archive_dtype": "fp8" if settings.plan.is_fp8 else "auto",
    }


def _capacity(name: str, cache: Capacity) -> list[tuple[Labels, float]]:
    return [
        ({"cache": name, "phase": "decode"}, cache.in_decode),
        ({"cache": name, "phase": "prefill"}, cache.in_prefill),
    ]
