"""The loss of LeanK: how far scaled far keys move the hidden states of answer tokens.

Teacher and student see the same context with full attention, so its K and V are computed once,
without gradients, and shared. Only the answer's tokens run twice: with full attention, and with the
K of far tokens scaled. Compared with two passes over everything this gives the same gradients,
costs about a third of the time and keeps no activations of the context.
"""

from collections.abc import Sequence

import torch
import transformers

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.offline.attention_hook import hooked_attention
from vllm_leank.offline.context import Context, hidden_states, read_prompt
from vllm_leank.offline.far_attention import far_attention
from vllm_leank.offline.prompts import Sample


class Distiller:
    """Computes the loss of factors on samples, for a model whose weights are frozen by it.

    Prompts are computed `chunk` tokens at a time, which bounds the memory of activations. With
    `means` of far keys (fp32 `[L, H, D]`) channels are scaled down to these, else to 0.

    Raises:
        UserError: the model has no plain causal attention behind transformers' AttentionInterface;
            some of that shows only when `loss` runs it.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        window: Window,
        chunk: int = 4096,
        means: torch.Tensor | None = None,
    ):
        self.window = window
        self.chunk = chunk
        self.means = means
        self.model = model.requires_grad_(False).eval()
        self.context = Context(Geometry.from_hf_config(model.config))

    def loss(
        self, sample: Sample, factors: torch.Tensor, blind: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Squared difference of the final hidden states of the answer's tokens, a mean; fp32.

        `factors` is fp32 `[L, H, D]` and gets gradients; heads where `blind` (bool `[L, H]`) see no
        far token.
        """
        read_prompt(self.model, self.context, sample.prompt, self.chunk)
        with torch.no_grad():
            teacher = self._answer(sample.answer, None, None)
        student = self._answer(sample.answer, factors, blind)
        return (student - teacher).square().mean()

    def _answer(
        self, answer: list[int], factors: torch.Tensor | None, blind: torch.Tensor | None
    ) -> torch.Tensor:
        """Final hidden states, fp32 `[1, T, hidden]`, of the answer's tokens after the context."""

        def attend(
            layer: int,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            scaling: float | None,
            sink_scores: torch.Tensor | None,
        ) -> torch.Tensor:
            return self.attention(
                layer,
                query,
                [self.context.key(layer), key],
                [self.context.value(layer), value],
                None if factors is None else factors[layer].to(query.device),
                None if blind is None else blind[layer].to(query.device),
                scaling,
                sink_scores,
            )

        with hooked_attention(self.model, attend, context=self.context):
            return hidden_states(self.model, self.context, answer).float()

    def attention(
        self,
        layer: int,
        query: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        factors: torch.Tensor | None,
        blind: torch.Tensor | None,
        scaling: float | None,
        sink_scores: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention `[1, T, num_heads, D]` of a layer, as `far_attention` has it, with the layer's
        `factors` (None: the teacher's).
        """
        means = None if self.means is None else self.means[layer].to(query.device)
        return far_attention(
            query, keys, values, self.window, factors, blind, scaling, sink_scores, means
        )
