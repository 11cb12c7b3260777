"""vLLM's cache of 4-bit codes with a scale for each token and head."""

from functools import cache

import torch
from vllm.v1.attention.ops.int4_per_token_head import single_rht

from baselines.rounded_cache import RoundedCache
from vllm_leank.core.geometry import Geometry


class VllmInt4(RoundedCache):
    """`--kv-cache-dtype int4_per_token_head` of vLLM 0.32.

    K and V are turned by a random Hadamard matrix, which is vLLM's own here, and rounded
    to 16 codes from the smallest to the largest number of a token and head. The step is fp32; the
    code of zero stands in the last four bits of its mantissa.
    """

    name = "vLLM int4_per_token_head"

    def layer_bytes(self, geometry: Geometry, layer: int) -> float:
        return 2 * geometry.num_kv_heads * (geometry.head_dim / 2 + 4)

    def round(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _turned_and_rounded(key), _turned_and_rounded(value)


def _turned_and_rounded(x: torch.Tensor) -> torch.Tensor:
    """`x` `[..., D]` turned, rounded, and turned back."""
    width = x.shape[-1]
    turned = (x.float() @ _turn(width, False, x.device)).to(x.dtype).float()
    least, most = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
    step = ((most - least) / 15).clamp(min=1e-6)
    zero = _nearest(-least / step).clamp(0, 15)
    codes = _nearest(turned * (1 / step) + zero).clamp(0, 15)
    stored_step = (step.view(torch.int32) & -16).view(torch.float32)
    # Turning twice multiplies by the largest power of two in the head's width.
    back = (codes - zero) * stored_step @ _turn(width, True, x.device)
    return back / (width & -width)


@cache
def _turn(width: int, inverse: bool, device: torch.device) -> torch.Tensor:
    """What vLLM turns rows of so many numbers with, `[width, width]` of 1, -1 and 0.

    Asked of vLLM once, and checked, and not for each row: with its kernel for GPUs, which computes
    in bf16, one text's logits were not finite in a run, and were in the next. Where that kernel is
    at hand, vLLM takes it for tensors of any device, so the CPU cannot be asked instead.
    """
    turn = single_rht(torch.eye(width, device=device), inverse).round()
    assert torch.equal(turn @ turn.mT, (width & -width) * torch.eye(width, device=device))
    return turn


def _nearest(x: torch.Tensor) -> torch.Tensor:
    """The nearest whole number; halves go away from zero."""
    return (x.abs() + 0.5).floor().copysign(x)
