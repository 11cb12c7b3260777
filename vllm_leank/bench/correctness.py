"""Whether what a timed call puts out is right: times of wrong results are not reported."""

import torch

from vllm_leank.bench.cases import Case
from vllm_leank.bench.results import CorrectnessError
from vllm_leank.core.capacity import EIGHT_BIT_CACHE

TOLERANCES = {"leank": 0.01, "flash": 0.01, f"flash_{EIGHT_BIT_CACHE}": 0.15}
"""Relative RMS error up to which an output counts as right. FlashAttention rounds softmax weights
to 8 bits where K and V have them; leank does not."""


def check_output(name: str, case: Case, output: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative RMS error of an output.

    Raises:
        CorrectnessError: it is too large or NaN.
    """
    difference = output.double() - expected.double()
    error = float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())
    tolerance = TOLERANCES[name.partition(",")[0]]
    if not error <= tolerance:
        raise CorrectnessError(
            f"{name}, {case}: relative RMS error {error:.3g} against the reference, where "
            f"{tolerance} is allowed; nothing is reported"
        )
    return error
