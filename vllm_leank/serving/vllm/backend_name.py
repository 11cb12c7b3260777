"""Makes `--attention-backend leank` known in every process. For vLLM 0.32 and 0.33.

Goes when vLLM pickles backends by name.
"""

import copyreg
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig


BACKEND = "LEANK"


def register_backend_name(class_path: str, load: Callable[[str], Any]) -> None:
    """Make `--attention-backend leank` mean the class at `class_path`, in every process.

    vLLM pickles its config, and with it the backend's enum member, for processes that it spawns,
    and unpickles it there before it loads plugins. So members pickle as a call of `load`, which
    sees to it that leank is registered, and then takes `backend_member`.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, class_path)
    copyreg.pickle(AttentionBackendEnum, lambda member: (load, (member.name,)))


def backend_member(name: str) -> Any:
    """The enum member of a backend."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[name]


def is_selected(vllm_config: "VllmConfig") -> bool:
    """Whether the user chose leank, for all layers or for one kind of them."""
    config = vllm_config.attention_config
    backends = [config.backend, *config.backend_per_kind.values()]
    return any(getattr(backend, "name", None) == BACKEND for backend in backends)
