"""Kernels that the interpreter runs here also compile, and fit into multiprocessors."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from vllm_leank.kernels.launch import TMA_CAPABILITIES

from vllm_leank.core.formats import known_formats

SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes that a program may have, by compute capability: A100, L40, H100, B200, RTX 5090."""

MOST_SPILLED = 512
"""Bytes of stack of a decode kernel whose registers are capped, so that more programs run at once.
Of others nothing may spill."""


COMPILED = ("90-128-packed", "90-256-packed+states", "90-128-packed+many")
OTHERS = (
    *("80-128-auto", "90-128-auto", "100-64-auto", "120-256-auto"),
    *("80-128-packed", "100-64-packed", "120-256-packed", "80-128-auto+pages"),
    *("80-128-packed+profiles", "90-128-packed+profiles", "100-128-packed+profiles"),
    "90-128-packed+few",
    *("80-128-packed+many", "100-128-packed+many", "120-128-packed+many", "90-64-packed+many"),
    *("90-256-packed+many", "80-128-packed+bits", "90-128-packed+bits", "90-128-auto+many"),
    *("80-128-packed+pages", "90-128-packed+pages", "100-64-packed+pages", "120-256-packed+pages"),
)
"""Compute capabilities, head sizes and archive formats: some, and the others. Up to a
minute of work each, so none is compiled where it would come out as elsewhere: 8.9 differs from 8.0
in the memory that there is alone, which what was compiled for 8.0 must fit as well."""

ATTENTION = {"decode_kernel", "combine_kernel", "_extend_kernel"}
SELECTING = {
    "_update_kernel", "_score_kernel", "_pick_kernel", "decode_kernel", "combine_kernel"
}  # fmt: skip
KERNELS = {
    "auto": ATTENTION,
    "packed": ATTENTION | {"_merge_kernel", "_unpack_kernel"},
    "packed+pages": SELECTING,
    "auto+pages": SELECTING,
    "auto+many": {"_update_kernel", "decode_kernel", "combine_kernel"},
    "packed+states": {"_update_kernel", "decode_kernel", "combine_kernel"},
    "packed+few": {"_update_kernel", "decode_kernel", "combine_kernel"},
    "packed+many": {"_update_kernel", "decode_kernel", "combine_kernel"},
    "packed+bits": {"_update_kernel", "decode_kernel", "combine_kernel"},
    "packed+profiles": {"_update_kernel", "decode_kernel", "combine_kernel"},
}
"""What is launched for an archive: codes are unpacked, tokens selected, and beside states prompts
read by FlashAttention.
"""


def test_every_format_is_compiled():
    kinds = {one.rpartition("-")[2].partition("+")[0] for one in OTHERS}
    assert kinds == {one.name for one in known_formats()}


@pytest.fixture(scope="module")
def compiled():
    """Give what became of the kernels of several cases. They are compiled in a process of its own,
    as the interpreter has taken Triton's place in this one.
    """

    @cache
    def compile_all(cases):
        tests = Path(__file__).parent
        paths = [str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, tests / "compile_kernels.py", *cases],
            env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    return compile_all


@pytest.mark.parametrize(
    "case", [*COMPILED, *(pytest.param(one, marks=pytest.mark.long) for one in OTHERS)]
)
def test_attention_kernels_compile_for_gpus_that_are_not_here(compiled, case):
    cases = COMPILED if case in COMPILED else OTHERS
    found = [one for one in compiled(cases) if one["case"] == case]
    capability, _, kind = case.split("-")
    capability = int(capability)
    assert {one["kernel"] for one in found} == KERNELS[kind]
    least = min(SHARED_MEMORY[one] for one in SHARED_MEMORY if one // 10 == capability // 10)
    assert max(one["shared"] for one in found) <= least
    if capability // 10 in TMA_CAPABILITIES:
        for one in found:
            if one["kernel"] != "_extend_kernel":
                assert (one["stack"] or 0) <= (MOST_SPILLED if one["capped"] else 0), one
