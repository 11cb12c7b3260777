"""What stands in for the backend on a vLLM that leank does not know."""

from typing import Any

from vllm_leank.serving.vllm import backend_name, versions


def refuse(vllm_config: Any) -> None:
    """Refuse a config that selects leank.

    Raises:
        RuntimeError: names the installed and the supported versions.
    """
    if backend_name.is_selected(vllm_config):
        raise RuntimeError(_reason())


class UnsupportedBackend:
    """Known by name alone: `refuse` ends startup before vLLM asks for more than this."""

    @classmethod
    def validate_configuration(cls, **_: Any) -> list[str]:
        """Why no layer can be served."""
        return [_reason()]


def _reason() -> str:
    installed = versions.vllm_version() or "none"
    return versions.unsupported_vllm(installed) or "vllm-leank was set up for another vLLM"
