"""An archive of codes whose means and scales have gradients: what distillation would make of them.

It gives back what `ServedArchive` does, in fp32. Gradients pass the rounding as if it were not
there, and end where a number lies beyond its outermost code, as in LSQ (arXiv 1902.08153): means
and scales get the gradients of what their codes stand for. Scales of V's tokens, too, which engines
round to fp16.
"""

import torch

from vllm_leank.core.formats.packed import CODE_CLASSES, LARGEST_SCALE, LEAST_SCALE, STEPS
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.statistics import Statistics


class TrainedCodes:
    """An `Archive` for `SimulatedArchive`.

    Attributes:
        shifts: of the means of K and V, fp32 `[2, L, H, D]`, in scales of the mask.
        stretches: of the scales, their logarithms, fp32 `[2, L, H, D]`.
    """

    def __init__(self, mask: Mask, device: torch.device):
        assert mask.statistics is not None
        known = mask.statistics
        put = lambda *arrays: torch.stack([torch.tensor(one) for one in arrays]).to(device)  # noqa: E731
        self.mean = put(known.k_mean, known.v_mean).float()
        self.scale = put(known.k_scale, known.v_scale).float()
        self.bits = put(mask.k_bits, mask.v_bits)
        self.shifts = torch.zeros_like(self.mean, requires_grad=True)
        self.stretches = torch.zeros_like(self.mean, requires_grad=True)
        self.step = torch.zeros_like(self.mean)
        for bits in CODE_CLASSES:
            self.step[self.bits == bits] = STEPS[bits]

    def means(self) -> torch.Tensor:
        """Of K and V, fp32 `[2, L, H, D]`."""
        return self.mean + self.shifts * self.scale

    def scales(self) -> torch.Tensor:
        """Of K and V, fp32 `[2, L, H, D]`."""
        return self.scale * self.stretches.exp()

    def statistics(self) -> Statistics:
        """As a mask's file has them."""
        mean, scale = (one.detach().cpu().half().numpy() for one in (self.means(), self.scales()))
        return Statistics(mean[0], scale[0], mean[1], scale[1])

    def __call__(
        self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[B, H, T, D]` of the tokens from `first` on, as codes give them back."""
        return self._back(0, layer, key), self._back(1, layer, value)

    def _back(self, kind: int, layer: int, x: torch.Tensor) -> torch.Tensor:
        part = kind, layer
        row = lambda known: known[part][:, None]  # noqa: E731  [H, 1, D]
        mean = row(self.mean) + row(self.shifts) * row(self.scale)
        scale = row(self.scale) * row(self.stretches).exp()
        bits, step = row(self.bits), row(self.step)
        coded = bits > 0
        deviation = (x.float() - mean) / scale
        of_token = torch.ones_like(x[..., :1])
        if kind == 1:
            square = (deviation.square() * coded).sum(-1, keepdim=True)
            count = coded.sum(-1, keepdim=True).clamp(min=1)
            root = (square / count + 1e-12).sqrt().clamp(LEAST_SCALE, LARGEST_SCALE)
            of_token = root + (root.half().float() - root).detach()
        unit = step * of_token
        half = 2.0 ** (bits.float() - 1)
        steps = deviation / torch.where(coded, unit, 1.0)
        # The floor as a constant of the backward pass, and what is beyond the ends as the ends.
        middle = steps + (steps.floor() + 0.5 - steps).detach()
        code = torch.minimum(torch.maximum(middle, 0.5 - half), half - 0.5)
        return mean + torch.where(coded, code * unit, 0.0) * scale
