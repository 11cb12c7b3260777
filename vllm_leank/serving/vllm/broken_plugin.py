"""Has options of a plugin that could not be set up end startup. For vLLM 0.32 and 0.33.

Imports nothing of the package, since that may be what is broken. Goes when vLLM lets plugins check
the config.
"""

import functools
from typing import Any


def refuse_options(key: str, error: Exception) -> None:
    """Refuse every config whose `additional_config` has `key`, since `error` stopped the plugin."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if "_leank_broken" in platform.__dict__:
        return
    check_and_update = platform.check_and_update_config.__func__
    reason = f"{type(error).__name__}: {error}"

    @functools.wraps(check_and_update)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        check_and_update(cls, vllm_config)
        options = getattr(vllm_config, "additional_config", None)
        if isinstance(options, dict) and key in options:
            raise RuntimeError(
                f"{key} options are given, but vllm-leank could not be set up ({reason}): install "
                "it anew, or remove the options from --additional-config"
            )

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform._leank_broken = True
