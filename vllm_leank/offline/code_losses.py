"""What answers lose where a channel of far K or V is known by so many bits.

A second reading of the prompts, once means and scales are known. Errors e of a channel, small as
they are, move the model's next-token distribution by about `(sum over tokens of g e)^2 / 2` nats,
where g are the gradients of `fisher`. Errors of tokens that have nothing in common add up like
`sum of (g e)^2`. But a prompt whose K or V lie beside the mean has that error in all its tokens,
and in a first layer the same token has the same error wherever it stands: then far more is lost.
So the sum is taken before the square, for each number of bits.

Few prompts and draws tell little of a single channel in this way. Half of what is said of it comes
from squares taken before the sum, larger by what the whole head's are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import transformers

from vllm_leank.core.formats.packed import CODE_CLASSES
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.offline.allocate import Losses
from vllm_leank.offline.archive import row
from vllm_leank.offline.fisher import FarSquares, far_gradients
from vllm_leank.offline.quantise import LEAST, decode, encode, token_scales
from vllm_leank.offline.statistics import ChannelStatistics

Array = npt.NDArray[np.float64]

DRAWS, ON_CPU = 4, 2
"""How often labels are drawn for a prompt's last tokens: a backward pass each, which takes a CPU
long.
"""

BITS = 0, *CODE_CLASSES


@dataclass(frozen=True)
class Known:
    """What codes are made with: statistics, and scales of K for each class, `[L, H, D]`."""

    statistics: ChannelStatistics
    k_scales: Mapping[int, Array]

    def key_errors(self, layer: int, key: torch.Tensor, bits: int) -> torch.Tensor:
        """What codes of so many bits make wrong in K `[H, T, D]`, fp32."""
        rest = key.float() - row(self.statistics.k_mean[layer], key)
        if not bits:
            return -rest
        return _errors(rest, row(self.k_scales[bits][layer], key).clamp(min=LEAST), bits)

    def value_errors(self, layer: int, value: torch.Tensor, bits: int) -> torch.Tensor:
        """The same of V."""
        rest = value.float() - row(self.statistics.v_mean[layer], value)
        if not bits:
            return -rest
        scale = row(self.statistics.v_scale[layer], value).clamp(min=LEAST)
        of_token = token_scales(rest / scale, torch.tensor(bits, device=rest.device))
        return _errors(rest, scale * of_token, bits)


@dataclass
class FarLosses(FarSquares):
    """An attention hook that adds up, for each of `BITS`, the squares of sums of gradients times
    errors, and the sums of their squares: `[bits, 2, H, D]` for K and for V of each layer.
    """

    known: Known | None = None

    def of_key(self, layer: int, far: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        assert self.known is not None
        return _squares(gradient, (self.known.key_errors(layer, far, bits) for bits in BITS))

    def of_value(self, layer: int, far: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        assert self.known is not None
        return _squares(gradient, (self.known.value_errors(layer, far, bits) for bits in BITS))


def code_losses(
    model: transformers.PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    window: Window,
    known: Known,
    *,
    draws: int | None = None,
    seed: int = 0,
) -> tuple[Losses, Losses]:
    """Losses of the channels of K and of V, means over prompts and draws; by default as many of
    these as the model's device bears.

    Raises:
        UserError: as `far_gradients`, or gradients are not finite.
    """
    draws = draws or draws_on(model.device)
    L, H, D = known.statistics.k_mean.shape
    sums = np.zeros((L, 2, len(BITS), 2, H, D))
    passes = 0
    for found in far_gradients(
        model, prompts, window,
        lambda context, of, places: FarLosses(context, of, places, known=known),
        draws=draws, seed=seed,
    ):  # fmt: skip
        for layer, both in found.sums.items():
            for side, squares in enumerate(both):
                sums[layer, side] += squares.double().cpu().numpy()
        passes += draws
    if not np.isfinite(sums).all():
        raise UserError("gradients of K or V are not finite; try another dtype")
    together, alone = (sums / passes).transpose(3, 1, 2, 0, 4, 5)  # [2, bits, L, H, D] each
    heads = together.sum(-1, keepdims=True) / alone.sum(-1, keepdims=True).clip(1e-300)
    keys, values = (together + heads * alone) / 2
    return dict(zip(BITS, keys, strict=True)), dict(zip(BITS, values, strict=True))


def draws_on(device: torch.device) -> int:
    """How often labels are drawn where it is not said."""
    return ON_CPU if device.type == "cpu" else DRAWS


def _squares(gradient: torch.Tensor, errors: Iterable[torch.Tensor]) -> torch.Tensor:
    products = [gradient * one for one in errors]
    return torch.stack([torch.stack((p.sum(1).square(), p.square().sum(1))) for p in products])


def _errors(rest: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return decode(encode(rest / scale, bits), bits) * scale - rest
