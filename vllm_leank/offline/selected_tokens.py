"""Which far tokens queries read where they read the best ones alone, in transformers."""

import torch

from vllm_leank.core.selection import Selection, selection_of
from vllm_leank.core.window import GRANULE
from vllm_leank.kernels.reference_selection import granule_scores, select
from vllm_leank.offline.served_archive import ServedArchive


class SelectedTokens:
    """Chooses for `SimulatedArchive` as engines do with the option `pages`: every query for itself,
    by the lead of K, as the archive gives it back.

    Args:
        archive: what far tokens are stored in.
        sink: tokens of the sink, behind which far tokens begin.
        selection: how many segments are read.
    """

    def __init__(self, archive: ServedArchive, sink: int, selection: Selection):
        self._archive, self._sink, self._selection = archive, sink, selection

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
        """Bool `[B, H, T, tokens]`: what queries read of far tokens; None where they read all.

        Args:
            layer: number of the layer, one of those that are served.
            query: `[B, num_heads, T, D]`, after RoPE.
            key: `[B, H, tokens, D]` of the far tokens that all of the queries may see, stored and
                read back: whole granules.
        """
        selection = selection_of(self._selection, layer)
        if selection is None:
            return None
        B, _, T, _ = query.shape
        H, tokens = key.shape[1:3]
        queries = query.unflatten(1, (H, -1)).float()  # [B, H, group, T, D]
        seen = torch.ones((B, T, tokens // GRANULE), dtype=torch.bool, device=key.device)
        found = []
        for index, head in enumerate(self._archive.channels(layer, key.device).heads):
            lead = head.k.order[: self._archive.archive_format.lead(head.profile)]
            keys = key[:, None, index, :, lead].float()
            scores = granule_scores(queries[:, index, ..., lead], keys)  # [B, group, T, granules]
            found.append(select(scores, seen, self._sink, selection))
        return torch.stack(found, dim=1).repeat_interleave(GRANULE, dim=-1)
