"""Entry point: vLLM calls `register` in every process, also for those who do not use leank."""

import logging
from typing import Any


def register() -> None:
    """Make `--attention-backend leank` known to vLLM.

    Never raises, may be called again, and imports nothing heavy beyond what vLLM has loaded. With
    a vLLM outside the supported range, leank stays selectable, and selecting it says so. Where it
    cannot be set up, its options end startup: what was meant to have leank must not serve without.
    """
    try:
        _register()
    except Exception as error:
        logging.getLogger("vllm.leank").exception(
            "vllm-leank could not be set up; --attention-backend leank will not be known"
        )
        _refuse_options(error)


def _refuse_options(error: Exception) -> None:
    try:
        from vllm_leank.serving.vllm.broken_plugin import refuse_options

        refuse_options("leank", error)
    except Exception:
        logging.getLogger("vllm.leank").exception("leank's options cannot be refused either")


def load_backend(name: str) -> Any:
    """The member of vLLM's enum of backends, in a process that may not have loaded plugins yet."""
    from vllm_leank.serving.vllm.backend_name import BACKEND, backend_member

    if name == BACKEND:
        register()
    return backend_member(name)


def _sliding_backend(path: str) -> str:
    # Imported late: it is needed where such a layer is made.
    from vllm_leank.serving.sliding import sliding_backend

    return sliding_backend(path)


def _register() -> None:
    from vllm_leank.serving.vllm import backend_name, platform, versions

    installed = versions.vllm_version()
    if installed is None:
        return
    problem = versions.unsupported_vllm(installed)
    if problem is None:
        from vllm_leank.serving.checks import check_config

        check, backend = check_config, "vllm_leank.serving.backend.LeanKBackend"
    else:
        from vllm_leank.serving.unsupported import refuse

        check, backend = refuse, "vllm_leank.serving.unsupported.UnsupportedBackend"
    # The name comes last: where it is known, configs are checked.
    platform.hook_platform(check, _sliding_backend)
    backend_name.register_backend_name(backend, load_backend)
