"""Counts of ours among the scheduler's statistics, and gauges of ours in `/metrics`. For vLLM 0.32
and 0.33.

Goes when vLLM's statistics have room for a plugin's, and when its stat logger plugins leave
`--disable-log-stats` alone.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

from vllm_leank.serving.vllm.backend_name import is_selected

Observe = Callable[[dict[str, int], int], None]


_USAGE = "leank_"  # how our counts begin among vLLM's


def hook_metrics(publish: Callable[["VllmConfig", Any], Observe]) -> None:
    """Call `publish` with a leank server's config and vLLM's Prometheus logger, once its cache has
    its size; then what it gives, with every count of `hook_statistics` and the engine's number.

    vLLM's stat logger plugins would do, but while one is installed vLLM ignores
    `--disable-log-stats`, with leank or without. Goes when that ends.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    if "_leank_hooked" in PrometheusStatLogger.__dict__:
        return
    initialized = PrometheusStatLogger.log_engine_initialized
    record = PrometheusStatLogger.record

    @functools.wraps(initialized)
    def log_engine_initialized(self: Any) -> None:
        initialized(self)
        if is_selected(self.vllm_config):
            self._leank_observe = publish(self.vllm_config, self)

    @functools.wraps(record)
    def record_usage(self: Any, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        observe: Observe | None = getattr(self, "_leank_observe", None)
        if scheduler_stats is not None and observe is not None:
            counts = scheduler_stats.num_kv_fetch_reqs_by_stage
            # Taken out: vLLM's log looks at every count.
            names = [name for name in counts if name.startswith(_USAGE)]
            usage = {name.removeprefix(_USAGE): counts.pop(name) for name in names}
            if usage:
                observe(usage, kwargs.get("engine_idx", 0))
        record(self, scheduler_stats, *args, **kwargs)

    PrometheusStatLogger.log_engine_initialized = log_engine_initialized
    PrometheusStatLogger.record = record_usage
    PrometheusStatLogger._leank_hooked = True


def hook_statistics(archive_manager: type, make_usage: Callable[[Any, Any], Any]) -> None:
    """Have schedulers of leank send `make_usage(scheduler, archive manager).count(running)` with
    their statistics to the process that serves `/metrics`.

    They travel among counts by name that only KV connectors use, which leank refuses. Goes when
    vLLM's statistics have room for a plugin's.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    if "_leank_hooked" in Scheduler.__dict__:
        return
    make_stats = Scheduler.make_stats

    @functools.wraps(make_stats)
    def make_stats_with_usage(self: Any, *args: Any, **kwargs: Any) -> Any:
        stats = make_stats(self, *args, **kwargs)
        if stats is None or not is_selected(self.vllm_config):
            return stats
        usage = self.__dict__.get("_leank_usage")
        if usage is None:
            managers = self.kv_cache_manager.coordinator.single_type_managers
            (archive,) = (one for one in managers if isinstance(one, archive_manager))
            usage = self._leank_usage = make_usage(self, archive)
        counts = usage.count(self.running)
        stats.num_kv_fetch_reqs_by_stage.update(
            {_USAGE + name: count for name, count in counts.items()}
        )
        return stats

    Scheduler.make_stats = make_stats_with_usage
    Scheduler._leank_hooked = True
