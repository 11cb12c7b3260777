"""Sensitivities of single channels: what `leank` went by before it measured what codes lose."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import transformers

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.offline.fisher import DRAWS, QUERIES, far_gradients


@dataclass(frozen=True)
class Sensitivities:
    """Sums over far tokens of the squared gradient, float64 `[L, H, D]`, means over prompts."""

    key: npt.NDArray[np.float64]
    value: npt.NDArray[np.float64]


def sensitivities(
    model: transformers.PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    window: Window,
    *,
    queries: int = QUERIES,
    draws: int = DRAWS,
    chunk: int = 4096,
    seed: int = 0,
) -> Sensitivities:
    """Sensitivities of all channels over prompts of token ids; freezes the model's weights.

    Times the mean square of what an archive loses of a channel, this is what the loss costs, where
    errors of tokens have nothing in common.

    Raises:
        UserError: as `far_gradients`, or gradients are not finite.
    """
    shape = Geometry.from_hf_config(model.config).shape
    key, value, passes = np.zeros(shape), np.zeros(shape), 0
    for squares in far_gradients(
        model, prompts, window, queries=queries, draws=draws, chunk=chunk, seed=seed
    ):
        for layer, (of_key, of_value) in squares.sums.items():
            key[layer] += of_key.double().cpu().numpy()
            value[layer] += of_value.double().cpu().numpy()
        passes += draws
    if not (np.isfinite(key).all() and np.isfinite(value).all()):
        raise UserError("gradients of K or V are not finite; try another dtype")
    return Sensitivities(key / passes, value / passes)
