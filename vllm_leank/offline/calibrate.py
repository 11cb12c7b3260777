"""Makes a mask without training, from q, K and attention over sample prompts.

Two questions, answered by forward passes alone:

* Which channels of a head matter? A channel's part of an attention logit is `q_c * k_c`. Its mean
  square, taking q and k as independent, is `E[q_c^2] * E[k_c^2]`: the score that ThinK (arXiv
  2407.21018) gives the channels of one prompt, here averaged over many, since the importance of
  channels hardly depends on the prompt (LeanK, arXiv 2508.02215).
* Which heads matter? A mask only touches far tokens, those between sink and recent. So a head is
  worth its far attention mass: the mean share of its attention that falls on far tokens.

The score of a channel is the product of its share in its head's energy and of its head's far mass:

    score[l, h, c] = far_mass[l, h] * energy[l, h, c] / sum_c energy[l, h, c]

Raw energies (squared logits) cannot compare heads: large logits do not make a head useful. Shares
alone give all heads nearly the same budget, also those that look at recent tokens only. With the
far mass, heads that do not look far drop to no channels and save their V, too. What it does not
see is how much the far values change the output. `docs/accuracy.md` compares these rules.

Queries count by the tokens they stand at: with `query_tokens`, the last ones of each prompt. They
should be answers, as those are what reads pruned tokens when a model is served.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import transformers

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.kernels.sinks import softmax
from vllm_leank.mask.mask import Mask
from vllm_leank.offline.attention_hook import hooked_attention
from vllm_leank.offline.calibration_prompts import CalibrationPrompts
from vllm_leank.offline.mask_request import MaskRequest
from vllm_leank.offline.progress import reading

QUERY_CHUNK = 256
"""Queries whose attention is computed at once: bounds the memory of a long prompt."""


@dataclass(frozen=True)
class HeadStatistics:
    """What is known of the heads, float64: `energy` `[L, H, D]` and `far_mass` `[L, H]`.

    `energy` is `E[q_c^2] * E[k_c^2]` after RoPE. `far_mass` is the mean share, 0 to 1, of the
    attention on far tokens. Both are means over the query heads of a KV head's group as well.
    """

    energy: npt.NDArray[np.float64]
    far_mass: npt.NDArray[np.float64]

    def scores(self) -> npt.NDArray[np.float64]:
        """Far mass times the channel's share in its head's energy, `[L, H, D]`.

        Raises:
            UserError: no query saw a far token, or the statistics are not finite.
        """
        if not (np.isfinite(self.energy).all() and np.isfinite(self.far_mass).all()):
            raise UserError("q or K has values that are not finite; try another dtype")
        if not self.far_mass.any():
            raise UserError(
                "no query saw a far token; give longer prompts, or a smaller sink or recent"
            )
        return head_shares(self.energy) * self.far_mass[..., None]


@dataclass
class HeadMeter:
    """An attention hook that adds up q^2, K^2 and far attention mass, float64 on `device`; layers
    may be on others.

    Queries are those of the last `query_tokens` tokens of each prompt (None: all). The query at
    position t takes the keys `[sink, boundary(t + 1))` of `window` as far, as it does when served.
    """

    geometry: Geometry
    window: Window
    query_tokens: int | None
    device: torch.device

    def __post_init__(self) -> None:
        shape = self.geometry.shape
        self.q_sum = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.k_sum = torch.zeros_like(self.q_sum)
        self.far_sum = torch.zeros_like(self.q_sum[..., 0])
        self.q_count = torch.zeros(shape[0], dtype=torch.int64)
        self.k_count = torch.zeros_like(self.q_count)

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
        sink_scores: torch.Tensor | None,
    ) -> None:
        """Add one layer's q `[B, num_heads, T, D]` and K `[B, H, T, D]`, rows without padding."""
        _, H, D = self.q_sum.shape
        if layer >= self.q_sum.shape[0] or key.shape[1] != H or key.shape[-1] != D:
            raise UserError(
                f"attention layer {layer} has {key.shape[1]} KV heads of {key.shape[-1]}, "
                f"unlike the model's config ({self.geometry})"
            )
        if self.query_tokens is not None:
            query = query[:, :, -self.query_tokens :]
        grouped = query.unflatten(1, (H, -1))  # [B, H, group, T, D]
        q_sum = grouped.float().square().sum(dim=(0, 2, 3), dtype=torch.float64)
        k_sum = key.float().square().sum(dim=(0, 2), dtype=torch.float64)
        self.q_sum[layer] += q_sum.to(self.device)
        self.k_sum[layer] += k_sum.to(self.device)
        self.far_sum[layer] += far_mass(grouped, key, self.window, scaling, sink_scores).to(
            self.device
        )
        self.q_count[layer] += grouped.numel() // (H * D)
        self.k_count[layer] += key.numel() // (H * D)

    def statistics(self) -> HeadStatistics:
        """The means over everything seen.

        Raises:
            UserError: a layer was never observed.
        """
        if not bool((self.k_count > 0).all()):
            layers = torch.nonzero(self.k_count == 0).flatten().tolist()
            raise UserError(f"layers {layers} have no attention that can be observed")
        q_mean = self.q_sum.cpu() / self.q_count[:, None, None]
        k_mean = self.k_sum.cpu() / self.k_count[:, None, None]
        mass = self.far_sum.cpu() / self.q_count[:, None]
        return HeadStatistics((q_mean * k_mean).numpy(), mass.numpy())


def far_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    window: Window,
    scaling: float | None,
    sink_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention on far tokens, summed over queries: float64 `[H]`.

    `query` `[B, H, group, T, D]` stands at the last T positions of `key` `[B, H, S, D]`. `scaling`
    is what logits are multiplied by (None: `D ** -0.5`), `sink_scores` `[num_heads]` are attention
    sinks, which get a part of the whole.
    """
    T, S, D = query.shape[-2], key.shape[-2], key.shape[-1]
    scale = D**-0.5 if scaling is None else scaling
    sinks = None if sink_scores is None else sink_scores.view(*query.shape[1:3], 1, 1)
    keys = key.float().unsqueeze(2).transpose(-1, -2)  # [B, H, 1, D, S]
    at_key = torch.arange(S, device=key.device)
    at_query = torch.arange(S - T, S, device=key.device)[:, None]
    total = torch.zeros(key.shape[1], dtype=torch.float64, device=key.device)
    for q, t in zip(query.split(QUERY_CHUNK, -2), at_query.split(QUERY_CHUNK), strict=True):
        logits = (q.float() @ keys) * scale  # [B, H, group, chunk, S]
        weights = softmax(logits.masked_fill(at_key > t, float("-inf")), sinks)
        far = (at_key >= window.sink) & (at_key < window.boundary(t + 1))
        total += (weights * far).sum(dim=(0, 2, 3, 4), dtype=torch.float64)
    return total


def head_shares(energy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Each channel's share of its head's total, `[L, H, D]`; 0 in a head without energy."""
    totals = energy.sum(axis=-1, keepdims=True)
    return np.divide(energy, totals, out=np.zeros_like(energy), where=totals > 0)


def measure_heads(
    model: transformers.PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    window: Window,
    query_tokens: int | None = None,
) -> HeadStatistics:
    """Statistics of all heads of `model` over prompts of token ids.

    Raises:
        UserError: the model's attention is of a kind that cannot be observed or is not supported.
    """
    geometry = Geometry.from_hf_config(model.config)
    meter = HeadMeter(geometry, window, query_tokens, model.device)
    # The decoder without its head: logits of a long prompt would be larger than the model.
    decoder = model.base_model
    with torch.inference_mode(), hooked_attention(model, meter):
        for ids in reading(prompts, "attention of each head"):
            decoder(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    return meter.statistics()


def energy_mask(
    request: MaskRequest,
    model: transformers.PreTrainedModel,
    prompts: CalibrationPrompts,
    query_tokens: int | None = None,
) -> Mask:
    """The mask of `request` for a model, measured on prompts.

    Raises:
        UserError: as in `measure_heads`, or no prompt has far tokens.
    """
    heads = measure_heads(model, prompts.ids, request.window, query_tokens)
    provenance = {
        "method": "calibrate",
        "score": "far attention mass of the head * share of E[q^2]*E[k^2] in the head",
        **prompts.provenance,
        "query_tokens": query_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return request.mask(heads.scores(), provenance)
