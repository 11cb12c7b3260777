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
