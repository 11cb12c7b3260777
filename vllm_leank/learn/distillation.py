"""The loss of LeanK: how far scaled far keys move the hidden states of answer tokens.

Teacher and student see the same context with full attention, so its K and V are computed once,
without gradients, and shared. Only the answer's tokens run twice: with full attention, and with the
K of far tokens scaled. Compared with two passes over everything this gives the same gradients,
costs about a third of the time and keeps no activations of the context.
"""

from dataclasses import dataclass, field

import torch
import transformers
from torch.nn.attention.bias import causal_lower_right

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.offline.attention_hook import hooked_attention
from vllm_leank.offline.far_attention import far_attention
from vllm_leank.offline.prompts import Sample


@dataclass
class Context:
    """An attention hook that computes a prompt in chunks and keeps its K and V, `[1, H, S, D]`.

    Buffers stay from prompt to prompt and grow with the longest.
    """

    geometry: Geometry
    length: int = 0
    _keys: dict[int, torch.Tensor] = field(default_factory=dict)
    _values: dict[int, torch.Tensor] = field(default_factory=dict)
    _room: int = 0

    def begin(self, tokens: int) -> None:
        """Forget the last prompt; the next has `tokens` tokens."""
        self.length = 0
        if tokens > self._room:
            self._room = tokens
            self._keys.clear()
            self._values.clear()

    def key(self, layer: int) -> torch.Tensor:
        """K of the whole prompt after RoPE."""
        return self._keys[layer][:, :, : self.length]

    def value(self, layer: int) -> torch.Tensor:
        """V of the whole prompt."""
        return self._values[layer][:, :, : self.length]

    def advance(self, tokens: int) -> None:
        """Note that a chunk went through all layers.

        Raises:
            UserError: some layers have no attention that goes through the hook.
        """
        self.length += tokens
        if missing := set(range(self.geometry.num_layers)) - set(self._keys):
            raise UserError(
                f"layers {sorted(missing)} have no attention that goes through transformers' "
                "AttentionInterface, so no mask can be learned for them"
            )

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
    ) -> torch.Tensor:
        """Full causal attention of the chunk's queries over everything up to them."""
        H, D = self.geometry.num_kv_heads, self.geometry.head_dim
        if layer >= self.geometry.num_layers or (key.shape[1], key.shape[3]) != (H, D):
            raise UserError(
                f"attention layer {layer} has {key.shape[1]} KV heads of {key.shape[3]}, "
                f"unlike the model's config ({self.geometry})"
            )
        end = self.length + key.shape[2]
        for store, new in ((self._keys, key), (self._values, value)):
            if layer not in store:
                store[layer] = new.new_empty(1, H, self._room, D)
            store[layer][:, :, self.length : end] = new
        output = torch.nn.functional.scaled_dot_product_attention(
            query,
            self._keys[layer][:, :, :end],
            self._values[layer][:, :, :end],
            attn_mask=causal_lower_right(key.shape[2], end),
            scale=scaling,
            enable_gqa=True,
        )
        return output.transpose(1, 2).contiguous()


class Distiller:
    """Computes the loss of factors on samples, for a model whose weights are frozen by it.

    Prompts are computed `chunk` tokens at a time, which bounds the memory of activations.

    Raises:
        UserError: the model has no plain causal attention behind transformers' AttentionInterface;
            some of that shows only when `loss` runs it.
    """

    def __init__(self, model: transformers.PreTrainedModel, window: Window, chunk: int = 4096):
        self.window = window
        self.chunk = chunk
        self.model = model.requires_grad_(False).eval()
        self.context = Context(Geometry.from_hf_config(model.config))

    def loss(
        self, sample: Sample, factors: torch.Tensor, blind: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Squared difference of the final hidden states of the answer's tokens, a mean; fp32.

        `factors` is fp32 `[L, H, D]` and gets gradients; heads where `blind` (bool `[L, H]`) see no
        far token.
        """
        self._read(sample.prompt)
        with torch.no_grad():
            teacher = self._answer(sample.answer, None, None)
        student = self._answer(sample.answer, factors, blind)
        return (student - teacher).square().mean()

    @torch.no_grad()
    def _read(self, prompt: list[int]) -> None:
        """Fill the context with K and V of a prompt."""
        self.context.begin(len(prompt))
        with hooked_attention(self.model, self.context, mask=False):
            for at in range(0, len(prompt), self.chunk):
                chunk = prompt[at : at + self.chunk]
                self._hidden(chunk)
                self.context.advance(len(chunk))

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
        ) -> torch.Tensor:
            return far_attention(
                query,
                [self.context.key(layer), key],
                [self.context.value(layer), value],
                self.window,
                None if factors is None else factors[layer].to(query.device),
                None if blind is None else blind[layer].to(query.device),
                scaling,
            )

        with hooked_attention(self.model, attend, mask=False):
            return self._hidden(answer).float()

    def _hidden(self, ids: list[int]) -> torch.Tensor:
        """Final hidden states of tokens that stand right after the context."""
        tokens = torch.tensor([ids], device=self.model.device)
        first = self.context.length
        positions = torch.arange(first, first + len(ids), device=self.model.device)[None]
        # Our hooks keep K and V themselves. The decoder without its head: nobody needs logits.
        output = self.model.base_model(input_ids=tokens, position_ids=positions, use_cache=False)
        return output.last_hidden_state
