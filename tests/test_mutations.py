"""The faults of mutations.py are still where it would plant them, and their tests are there."""

import pytest
from mutations import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_a_fault_can_be_planted(repo, mutation):
    home = repo if mutation.module.startswith("kernels/") else repo / "vllm_leank"
    assert (home / mutation.module).read_text(encoding="utf-8").count(mutation.old) == 1
    for test in mutation.tests.split():
        file, _, name = test.partition("::")
        text = (repo / "tests" / file).read_text(encoding="utf-8")
        assert f"def {name.partition('[')[0]}" in text
