"""Which heads need no far tokens: what answers lose where a head reads sink and recent ones alone.

Papers call such heads streaming (DuoAttention, arXiv 2410.10819). Without far tokens a head's
softmax runs over the window, and its output changes by d at each of a prompt's last tokens. Their
distributions then move by about `(sum of g d)^2 / 2` nats, where g are the gradients of the log
probabilities of drawn labels by the output (Fisher information, as in `fisher`), and the sum is
over the tokens, the query heads that share K and V, and their channels. So the whole of what a head
gives up is one error, however its parts go together, and one backward pass measures all heads.

Few prompts and draws tell little in this way, as each gives one number. Half of what is said of a
head comes from squares taken token by token, larger by what those of all heads are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.compose import lowest_heads
from vllm_leank.offline.code_losses import draws_on
from vllm_leank.offline.far_attention import far_attention
from vllm_leank.offline.fisher import QUERIES, FarSums, far_gradients

BY_OUTPUT = "square of the sum of gradients times what the head's output loses without far tokens"
"""What provenances call the losses of heads."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StreamingHeads:
    """Heads that see no far tokens.

    Attributes:
        heads: bool `[L, H]`.
        losses: what each head of the model loses without far tokens, `[L, H]`, in the units of
            channels' losses: half of it is nats over a prompt's last `QUERIES` tokens.
        provenance: how they were chosen.
    """

    heads: npt.NDArray[np.bool_]
    losses: Array
    provenance: dict[str, Any]


def streaming_heads(
    losses: Array, share: float, scores: Array | None = None, by: str = BY_OUTPUT
) -> StreamingHeads:
    """A share of all heads: those that lose least, by `head_losses` `[L, H]`, or those with the
    lowest of other `scores` `[L, H]`, which `by` names.

    Raises:
        UserError: `share` is out of range, or leaves no other head.
    """
    check_share(share, losses.size)
    heads = lowest_heads(losses if scores is None else scores, share)
    provenance = {
        "share": float(share),
        "heads": int(heads.sum()),
        "by": by,
        "nats_per_token": float(f"{losses[heads].sum() / 2 / QUERIES:.3g}"),
    }
    return StreamingHeads(heads, losses, provenance)


def check_share(share: float, heads: int) -> None:
    """Refuse shares of so many heads that no mask can have.

    Raises:
        UserError: says what is allowed.
    """
    if not 0 <= share <= 1:
        raise UserError(
            f"streaming is {share:g}; it must lie between 0, where all heads see far tokens, and 1"
        )
    if round(share * heads) == heads:
        raise UserError(
            f"streaming is {share:g}, which leaves none of {heads} heads that see far tokens; give "
            "less"
        )


def head_losses(
    model: transformers.PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    window: Window,
    *,
    draws: int | None = None,
    seed: int = 0,
) -> Array:
    """What each head loses without far tokens, float64 `[L, H]`, means over prompts of token ids
    and draws; by default as many of these as the model's device bears.

    Raises:
        UserError: as `far_gradients`, or gradients are not finite.
    """
    draws = draws or draws_on(model.device)
    L, H, _ = Geometry.from_hf_config(model.config).shape
    sums, passes = np.zeros((2, L, H)), 0
    for found in far_gradients(
        model, prompts, window, _HeadSquares,
        draws=draws, seed=seed, what="what each head loses without far tokens",
    ):  # fmt: skip
        for layer, (squares,) in found.sums.items():
            sums[:, layer] += squares.double().cpu().numpy()
        passes += draws
    if not np.isfinite(sums).all():
        raise UserError("gradients of attention are not finite; try another dtype")
    together, alone = sums / passes
    losses: Array = (together + alone * (together.sum() / max(alone.sum(), 1e-300))) / 2
    return losses


@dataclass
class _HeadSquares(FarSums):
    """An attention hook that adds up squares `[2, H]` of what each head's output loses, times its
    gradient: of the sum over tokens, and of each token.
    """

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
        sink_scores: torch.Tensor | None,
    ) -> torch.Tensor:
        """Full causal attention of the new queries."""
        H = key.shape[1]
        keys = [self.context.key(layer), key]
        values = [self.context.value(layer), value]

        # In fp32, as differences may be small.
        def attend(blind: torch.Tensor | None) -> torch.Tensor:
            return far_attention(
                query.float(),
                keys,
                values,
                self.window,
                blind=blind,
                scaling=scaling,
                sink_scores=sink_scores,
            )

        output = attend(None)
        with torch.no_grad():
            lost = attend(torch.ones(H, dtype=torch.bool, device=query.device)) - output
        self.sums[layer] = [torch.zeros(2, H, device=query.device)]

        def take(gradient: torch.Tensor) -> None:
            products = (gradient * lost)[0].unflatten(1, (H, -1)).sum(dim=(2, 3))  # [T, H]
            squares = torch.stack((products.sum(0).square(), products.square().sum(0)))
            self.sums[layer][0] = self.sums[layer][0] + squares

        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(take)
        return output.to(query.dtype).contiguous()
