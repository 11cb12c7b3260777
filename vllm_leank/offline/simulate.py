"""What masks do to a model's answers, in transformers: quality only, nothing is saved or faster.

One attention for every method that is compared, with the same sink and recent tokens. Far keys lose
the channels that a method drops, and heads that keep none do not see far tokens; or far K and V are
what an archive gives back of them.
"""

from collections.abc import Callable

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
        sink_scores: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Attention of `query` `[B, num_heads, T, D]`, in fp32: `[B, T, num_heads, D]`."""
        if self.keep is None:
            return None
        keep = self.keep[layer].to(query.device)
        return far_attention(
            query,
            [key],
            [value],
            self.window,
            keep.float(),
            ~keep.any(-1),
            scaling,
            sink_scores,
        )


Archive = Callable[[int, int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Takes layer, first position, K after RoPE and V `[B, H, T, D]`; gives back both, as stored."""


Select = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""Takes layer, queries `[B, num_heads, T, D]` and far K `[B, H, tokens, D]` as stored, all of it
visible to them; gives back which tokens queries read, bool `[B, H, T, tokens]`, or None: all."""


class SimulatedArchive:
    """An attention hook under which queries read far K and V as an archive gives them back.

    Set `archive` between prompt and answer where prompts are computed with full attention; with
    None everything is read as it is, in the same attention. Heads where `blind` (bool `[L, H]`) do
    not see far tokens, as in an engine those do not that store nothing. With `selected` each query
    reads some of the far tokens alone.
    """

    def __init__(
        self,
        window: Window,
        archive: Archive | None = None,
        blind: torch.Tensor | None = None,
        selected: Select | None = None,
    ):
        self.window = window
        self.archive = archive
        self.blind = blind
        self.selected = selected

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
        """Attention of the last queries `[B, num_heads, T, D]`, in fp32: `[B, T, num_heads, D]`.

        Keys and values `[B, H, S, D]` are those of all tokens.
        """
        window, sink = self.window, self.window.sink
        last = key.shape[2]
        first = last - query.shape[2]
        far_end = window.boundary(last)
        if self.archive is None or far_end <= sink:
            return far_attention(
                query, [key], [value], window, scaling=scaling, sink_scores=sink_scores
            )
        far_key, far_value = self.archive(
            layer, sink, key[:, :, sink:far_end], value[:, :, sink:far_end]
        )
        blind = None if self.blind is None else self.blind[layer].to(query.device)
        outputs = []
        for start, end in _same_boundary(window, first, last):
            far = window.boundary(start + 1) - sink
            keys, values = (
                [dense[:, :, :sink], stored[:, :, :far], dense[:, :, sink + far : end]]
                for dense, stored in ((key, far_key), (value, far_value))
            )
            part = query[:, :, start - first : end - first]
            seen = None
            if self.selected is not None and far:
                seen = self.selected(layer, part, keys[1])
            outputs.append(
                far_attention(
                    part,
                    keys,
                    values,
                    window,
                    blind=blind,
                    scaling=scaling,
                    sink_scores=sink_scores,
                    seen=seen,
                )
            )
        return torch.cat(outputs, dim=1)


def _same_boundary(window: Window, first: int, last: int) -> list[tuple[int, int]]:
    """The positions from `first` to `last` in ranges whose queries have the same far tokens."""
    ranges: list[tuple[int, int]] = []
    for at in range(first, last):
        if ranges and window.boundary(at + 1) == window.boundary(ranges[-1][0] + 1):
            ranges[-1] = (ranges[-1][0], at + 1)
        else:
            ranges.append((at, at + 1))
    return ranges
