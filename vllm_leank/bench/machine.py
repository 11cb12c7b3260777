"""What results were measured on, with which versions and which code."""

import contextlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_leank import version
from vllm_leank.errors import UserError

VERSIONS_OF = ("torch", "triton", "vllm", "transformers", "numpy")


def require_gpu(what: str) -> None:
    """Refuse to go on without a GPU.

    Raises:
        UserError: torch sees none.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"{what} needs an NVIDIA GPU, and torch sees none")


def machine() -> dict[str, Any]:
    """What the numbers were measured on and with; null for what is not there."""
    gpu, driver = _gpu()
    versions = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "gpu": gpu,
        "driver": driver,
        "cpu": platform.processor() or platform.machine(),
        "versions": versions,
    }


def head_commit() -> str | None:
    """The commit of the checkout that this package runs from, with `-dirty` where it was changed;
    None outside a checkout.
    """
    here = Path(version.__file__)
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _gpu() -> tuple[str | None, str | None]:
    """Name of the GPU and version of its driver."""
    import torch

    if not torch.cuda.is_available():
        return None, None
    driver = None
    with contextlib.suppress(Exception):  # NVML is not everywhere, and its errors are its own
        from vllm.third_party import pynvml

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
    return torch.cuda.get_device_name(), driver


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
