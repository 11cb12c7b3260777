"""Each of the faults can still be planted, and the tests that should notice it are there."""

import os
import subprocess
import sys

import pytest
from faults import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda one: one.name)
def test_a_fault_can_be_planted(repo, fault):
    home = repo if fault.module.startswith("kernels/") else repo / "vllm_leank"
    assert (home / fault.module).read_text(encoding="utf-8").count(fault.old) == 1
    for test in fault.tests.split():
        file, _, name = test.partition("::")
        text = (repo / "tests" / file).read_text(encoding="utf-8")
        assert f"def {name.partition('[')[0]}" in text


@pytest.mark.long
def test_single_cases_of_tests_are_there(repo):
    names = {test for one in FAULTS for test in one.tests.split() if "[" in test}
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q"]
    done = subprocess.run(
        [*collect, *(f"tests/{one}" for one in names)],
        cwd=repo,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"tests/{one}" in done.stdout.splitlines() for one in names)
