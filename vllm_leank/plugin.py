"""Entry point: vLLM calls `register` in every process, also for those who do not use leank."""

import logging


def register() -> None:
    """Make `--attention-backend leank` known to vLLM.

    Never raises, may be called again, and imports nothing heavy beyond what vLLM has loaded. With
    a vLLM outside the supported range, leank stays selectable, and selecting it says so.
    """
    try:
        _register()
    except Exception:
        logging.getLogger("vllm.leank").exception(
            "vllm-leank could not be set up; --attention-backend leank will not be known"
        )


def _register() -> None:
    from vllm_leank import compat

    installed = compat.vllm_version()
    if installed is None:
        return
    problem = compat.unsupported_vllm(installed)
    if problem is None:
        from vllm_leank.checks import check_config

        check, backend = check_config, "vllm_leank.backend.LeanKBackend"
    else:
        from vllm_leank.unsupported import refuse

        check, backend = refuse, "vllm_leank.unsupported.UnsupportedBackend"
    # The name comes last: where it is known, configs are checked.
    compat.hook_platform(check)
    compat.register_backend_name(backend)
