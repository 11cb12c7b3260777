"""What masks do to a model's answers, in transformers: quality only, nothing is saved or faster.

One attention for every method that is compared, with the same sink and recent tokens: far keys lose
the channels that a method drops, and heads that keep none do not see far tokens.
"""

import torch

from vllm_leank.core.window import Window
from vllm_leank.offline.far_attention import far_attention


class SimulatedPruning:
    """An attention hook under which far keys lose channels.

    `keep` is bool `[L, H, D]`, or `[L, B, H, D]` where each row of a batch has its own; None leaves
    attention as it is. Set it between prompt and answer where prompts are computed with full
    attention.
    """

    def __init__(self, window: Window):
        self.window = window
        self.keep: torch.Tensor | None = None

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
    ) -> torch.Tensor | None:
        """Attention of `query` `[B, num_heads, T, D]`, in fp32: `[B, T, num_heads, D]`."""
        if self.keep is None:
            return None
        keep = self.keep[layer]
        return far_attention(
            query, [key], [value], self.window, keep.float(), ~keep.any(-1), scaling
        )


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
