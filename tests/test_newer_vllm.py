"""Engines on the newest vLLM that is supported: its Python over the compiled parts at hand."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from vllm_leank.version import SUPPORTED_VLLM

pytestmark = pytest.mark.engine

CHOSEN = (
    "test_engine_answers.py::test_preemption_does_not_matter[planned ahead-kept_mask]",
    "test_engine_features.py::test_salts_keep_prompts_apart_and_evicted_pages_are_not_found",
)
"""Chunks of prompts, decode, what the prefix cache finds and what it does not, preemption."""


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def newer(repo: Path, tmp_path_factory: pytest.TempPathFactory):
    """The release, and a folder with it."""
    end = re.search(r"<(\d+)\.(\d+)$", SUPPORTED_VLLM)
    assert end, SUPPORTED_VLLM
    release = f"{end[1]}.{int(end[2]) - 1}.0"
    if not version("vllm").endswith("+cpu") or version("vllm").startswith(release):
        pytest.skip(f"not an older vLLM's CPU build that {release} could be laid over")
    folder = tmp_path_factory.mktemp("newer") / "vllm"
    done = run(repo / ".ci/newer_vllm.py", release, folder)
    if "No matching distribution found" in done.stderr:
        pytest.skip(f"vLLM {release} cannot be downloaded here")
    assert not done.returncode, done.stderr
    return release, folder


def test_engines_answer_there(newer, repo):
    release, folder = newer
    told = run("-c", "import vllm; print(vllm.__version__)", PYTHONPATH=str(folder))
    assert told.stdout.strip() == release, told.stderr
    chosen = [repo / "tests" / one for one in CHOSEN]
    options = "-q", "-p", "no:cacheprovider", "-p", "no:xdist"
    done = run("-m", "pytest", *options, *chosen, PYTHONPATH=str(folder))
    assert not done.returncode, done.stdout[-4000:]
    assert f"{len(chosen)} passed" in done.stdout
