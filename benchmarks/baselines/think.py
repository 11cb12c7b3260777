"""ThinK: channels chosen anew for every prompt."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import transformers

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.offline.context import Context, logits_after, read_prompt
from vllm_leank.offline.plain_attention import plain_attention
from vllm_leank.offline.simulate import SimulatedPruning


class ThinK:
    """An attention hook that chooses channels for each prompt by itself, as ThinK does.

    ThinK (arXiv 2407.21018) scores a channel by the mean square of its last queries times that of
    its keys, after RoPE, and drops the same number in every head: no training, no mask, but other
    channels for every request. Here per KV head, with queries averaged over its group.

    Let it watch prompts computed in one pass; then ask for `keep`.
    """

    QUERIES = 32

    def __init__(self) -> None:
        self._energy: dict[int, torch.Tensor] = {}

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
        """Note the energies of one layer's prompts, q `[B, num_heads, T, D]`, K `[B, H, T, D]`."""
        last = query[:, :, -self.QUERIES :].unflatten(1, (key.shape[1], -1)).float()
        q = last.square().mean(dim=(2, 3))
        self._energy[layer] = q * key.float().square().mean(dim=2)

    def keep(self, ratio: float) -> torch.Tensor:
        """The channels to keep, bool `[L, B, H, D]`: of each head all but a share of `ratio`."""
        energy = torch.stack([self._energy[layer] for layer in sorted(self._energy)])
        count = round((1 - ratio) * energy.shape[-1])
        keep = torch.zeros_like(energy, dtype=torch.bool)
        return keep.scatter(-1, energy.topk(count, dim=-1).indices, True)


class PrunedByThinK(SimulatedPruning):
    """An attention hook under which far keys lose the channels that ThinK drops for a prompt."""

    def __init__(self, window: Window, ratio: float):
        super().__init__(window)
        self.ratio = ratio

    def begin(
        self, model: transformers.PreTrainedModel, context: Context, prompt: Sequence[int]
    ) -> None:
        """Choose channels for a prompt that the context has read. Its last tokens are computed
        again, to see their queries.

        Raises:
            UserError: it has no more than `ThinK.QUERIES` tokens.
        """
        think, read = ThinK(), context.mark()
        if read.length <= think.QUERIES:
            raise UserError(f"ThinK looks at {think.QUERIES} queries; the prompt has {read.length}")

        def watch(layer, query, key, value, attention_mask, scaling, sink_scores):
            think(layer, query, key, value, attention_mask, scaling, sink_scores)
            return plain_attention(query, key, value, None, scaling, sink_scores)

        if read.states is None:
            context.cut(replace(read, length=read.length - think.QUERIES))
        else:  # what they were there is not kept
            read_prompt(model, context, prompt[: -think.QUERIES], 4096)
        logits_after(model, context, prompt[-think.QUERIES :], watch)
        context.advance(think.QUERIES)
        self.keep = think.keep(self.ratio)
