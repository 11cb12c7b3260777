"""Hands out bits a second time, with layers weighed by what their archives were seen to cost.

The cost of a channel (`fisher`) takes errors as small, and those of tokens and channels as
independent. Where they are not, as in a first layer, whose K and V are much the same for the same
token, a layer may cost many times more. So once bits are handed out, each layer's archive stands
in the model alone, and the KL divergence that it causes is held against what its channels' costs
say. Layers are weighed by that, and bits are handed out again. Of all masks on the way the one is
kept with which answers change least.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import transformers

from vllm_leank.core.window import Window
from vllm_leank.mask.mask import Mask
from vllm_leank.offline.allocate import allocate, left_of
from vllm_leank.offline.calibrate_bits import Measured
from vllm_leank.offline.mask_request import BitsRequest
from vllm_leank.offline.progress import reading
from vllm_leank.offline.verify.reader import Reader

DAMPING = 0.5
"""Power of what a layer costs beyond its channels' costs by which its weight grows: what one layer
gets, others lose, and the next round goes on from there."""

SLIGHT = 0.1
"""Of the mean over layers: divergences much below it say little, and move no weight."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Effort:
    """How closely layers are looked at: a forward pass for each of them, prompt and round. A few
    tokens would not do: single ones may cost a hundred times what others do.

    Attributes:
        rounds: how often layers are weighed.
        prompts: that they are looked at on, at most.
        tokens: at the prompts' ends whose distributions are compared.
    """

    rounds: int
    prompts: int
    tokens: int

    @classmethod
    def on(cls, device_type: str) -> "Effort":
        """What takes no longer than measuring what codes lose: on a CPU nothing does."""
        return cls(0, 0, 0) if device_type == "cpu" else cls(2, 6, 64)


@dataclass(frozen=True)
class Seen:
    """KL divergences to full attention in nats per token: of each layer's archive alone, `[L]`,
    and of all together.
    """

    layers: Array
    together: float


def weighed_mask(
    request: BitsRequest,
    measured: Measured,
    model: transformers.PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    effort: Effort | None = None,
) -> Mask:
    """The mask of `request` for the model that was measured on these prompts of token ids; `effort`
    is by default what the model's device bears.

    Raises:
        UserError: logits are not finite.
    """
    effort = effort or Effort.on(model.device.type)
    samples = some_of(prompts, request.window, effort)
    weights = np.ones(len(measured.k_losses[0]))
    mask, expected = handed_out(request, measured, weights)
    found: list[tuple[float, Mask]] = []
    for _ in range(effort.rounds):
        seen = look_at_layers(model, mask, samples, effort.tokens, streaming=measured.blind)
        found.append((seen.together, mask))
        weights = weights * surplus(seen.layers, expected) ** DAMPING
        mask, expected = handed_out(request, measured, weights)
    if not found:
        return mask
    last = look_at_layers(model, mask, samples, effort.tokens, alone=False)
    return min([*found, (last.together, mask)], key=lambda one: one[0])[1]


def some_of(
    prompts: Sequence[Sequence[int]], window: Window, effort: Effort
) -> list[Sequence[int]]:
    """As many of the prompts as are looked at, evenly, of those that have far tokens before their
    last ones.
    """
    long = [ids for ids in prompts if window.boundary(len(ids) - effort.tokens) > window.sink]
    places = np.linspace(0, len(long) - 1, min(effort.prompts, len(long))).round().astype(int)
    return [long[place] for place in places]


def surplus(seen: Array, expected: Array) -> Array:
    """How many times more than expected, beside the others, each layer `[L]` was seen to cost."""
    level = seen.mean()
    if not level > 0:
        return np.ones_like(seen)
    slight = SLIGHT * level
    return (seen + slight) / (expected * (level / expected.mean()) + slight)


def look_at_layers(
    model: transformers.PreTrainedModel,
    mask: Mask,
    samples: Sequence[Sequence[int]],
    tokens: int,
    *,
    alone: bool = True,
    streaming: npt.NDArray[np.bool_] | None = None,
) -> Seen:
    """What a mask's archive costs at the last `tokens` of each sample of token ids; without
    `alone`, of no single layer. What heads where `streaming` (`[L, H]`) lose without far tokens
    counts to no layer, as no bits could change it.

    Raises:
        UserError: logits are not finite.
    """
    layers, together = np.zeros(len(mask.k_bits)), 0.0
    reader = Reader(model, mask, Window(mask.sink, mask.recent))
    blind = None if streaming is None else torch.tensor(streaming)
    for ids in reading(samples, "what each layer costs" if alone else "what they cost together"):
        prompt, rest = ids[:-tokens], ids[-tokens:]
        reader.begin(len(ids))
        reader.read(prompt)
        together += reader.compare(rest).total
        if alone:
            layers += [one.total for one in reader.compare_layers(rest, blind)]
    count = max(len(samples), 1) * tokens
    return Seen(layers / count, together / count)


def handed_out(request: BitsRequest, measured: Measured, weights: Array) -> tuple[Mask, Array]:
    """The mask where layers have these weights `[L]`, and what its channels' costs say of each
    layer, but for those of streaming heads.
    """
    both = measured.k_losses, measured.v_losses
    k_losses, v_losses = (
        {bits: loss * weights[:, None, None] for bits, loss in losses.items()} for losses in both
    )
    chosen = allocate(k_losses, v_losses, request.bits, blind=measured.blind)
    provenance = measured.told()
    if (weights != 1).any():
        provenance["layer_weights"] = [round(float(weight), 3) for weight in weights]
    mask = request.mask(chosen, measured.for_codes(chosen), provenance)
    left = left_of(both[0], chosen.k_bits) + left_of(both[1], chosen.v_bits)
    if measured.blind is not None:
        left[measured.blind] = 0
    return mask, left.sum(axis=(1, 2))
