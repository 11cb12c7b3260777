"""Kernels that the interpreter runs here also compile, and fit into multiprocessors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_leank.kernels.launch import TMA_CAPABILITIES

from vllm_leank.core.formats import known_formats

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes that a program may have, by compute capability: A100, L40, H100, B200, RTX 5090."""

MOST_SPILLED = 512
"""Bytes of stack of a decode kernel whose registers are capped, so that more programs run at once.
Of others nothing may spill."""


COMPILED = [
    (80, 128, ("auto", "packed")),
    (90, 128, ("auto", "packed")),
    (100, 64, ("auto", "packed")),
    (120, 256, ("auto", "packed")),
]
"""Compute capabilities, head sizes and archive formats. A minute of work each, so none is compiled
where it would come out as elsewhere: 8.9 differs from 8.0 in the memory that there is alone, which
what was compiled for 8.0 must fit as well."""


def test_every_format_is_compiled():
    assert {name for *_, names in COMPILED for name in names} == {
        one.name for one in known_formats()
    }


@pytest.mark.parametrize(("capability", "head_dim", "formats"), COMPILED)
def test_attention_kernels_compile_for_gpus_that_are_not_here(capability, head_dim, formats):
    """In a process of its own, as the interpreter has taken Triton's place in this one."""
    tests = Path(__file__).parent
    paths = [str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, tests / "compile_kernels.py", str(capability), str(head_dim), *formats],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["kernel"] for one in found} == {
        "_decode_kernel", "combine_kernel", "_extend_kernel", "_merge_kernel", "_unpack_kernel",
        "_update_kernel", "_score_kernel", "_pick_kernel",
    }  # fmt: skip
    assert {one["archive"] for one in found} == set(formats)
    least = min(SHARED_MEMORY[one] for one in SHARED_MEMORY if one // 10 == capability // 10)
    assert max(one["shared"] for one in found) <= least
    if capability // 10 in TMA_CAPABILITIES:
        for one in found:
            if one["kernel"] != "_extend_kernel":
                assert (one["stack"] or 0) <= (MOST_SPILLED if one["capped"] else 0), one
