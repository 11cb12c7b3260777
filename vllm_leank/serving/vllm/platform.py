"""Has every config checked, leank chosen on CPU, and sliding layers left to vLLM. For vLLM 0.32 and
0.33.

Goes when vLLM lets plugins check the config, when `CpuPlatform.get_attn_backend_cls` looks at its
argument, and when `backend_per_kind` can name leank for full attention alone.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

from vllm_leank.serving.vllm.backend_name import BACKEND


def hook_platform(
    check_config: Callable[["VllmConfig"], None], sliding_backend: Callable[[str], str]
) -> None:
    """Run `check_config` on every `VllmConfig`, after the platform's own check; make the CPU
    platform honour the choice of leank, which it would replace by its own backend; and have sliding
    layers use what vLLM chooses, by `sliding_backend`.
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
        is_ours = getattr(selected_backend, "name", None) == BACKEND
        if is_ours and attn_selector_config.has_sliding_window:
            # `use_rswa` is our way to prompt lengths.
            theirs = attn_selector_config._replace(use_rswa=False)
            return sliding_backend(get_backend(cls, None, theirs, num_heads))
        if not is_ours or not cls().is_cpu():
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
