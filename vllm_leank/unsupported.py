"""What stands in for the backend on a vLLM that leank does not know."""

from typing import Any

from vllm_leank import compat


def refuse(vllm_config: Any) -> None:
    """Refuse a config that selects leank.

    Raises:
        RuntimeError: names the installed and the supported versions.
    """
    if compat.is_selected(vllm_config):
        raise RuntimeError(_reason())


class UnsupportedBackend:
    """Known by name alone: `refuse` ends startup before vLLM asks for more than this."""

    @classmethod
    def validate_configuration(cls, **_: Any) -> list[str]:
        """Why no layer can be served."""
        return [_reason()]


def _reason() -> str:
    installed = compat.vllm_version() or "none"
    return compat.unsupported_vllm(installed) or "vllm-leank was set up for another vLLM"
