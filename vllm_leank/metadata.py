"""A step's metadata: built once per cache group and step, shared by all layers of the group."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_leank.compat import prompt_lengths
from vllm_leank.kernels.batch import Batch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_SHARED = "_leank_metadata"


@dataclass
class PagesMetadata(AttentionMetadata):
    """What one cache group contributes to a step; see `Batch` for the shared fields.

    Attributes:
        query_start_loc: `[num_reqs + 1]`, on the host.
        seq_lens: `[num_reqs]`.
        exact_until: `[num_reqs]`; zeros in vLLM's dummy runs, which have no prompts.
        block_table: `[num_reqs, max_blocks]`, of this group.
        slots: `[num_tokens]`, of this group.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    exact_until: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor
    _batch: Batch | None = None

    @classmethod
    def of_step(cls, common: CommonAttentionMetadata) -> "PagesMetadata":
        """The group's part of vLLM's description of a step."""
        lengths = prompt_lengths(common)
        return cls(
            query_start_loc=common.query_start_loc_cpu,
            seq_lens=common.seq_lens,
            exact_until=torch.zeros_like(common.seq_lens) if lengths is None else lengths,
            block_table=common.block_table_tensor,
            slots=common.slot_mapping,
        )

    def batch(self, window: "PagesMetadata") -> Batch:
        """The step as kernels read it; `self` is the archive group's part. Made by the first layer
        that asks, for all layers.
        """
        if self._batch is None:
            self._batch = Batch(
                query_start_loc=self.query_start_loc,
                seq_lens=self.seq_lens,
                exact_until=self.exact_until,
                window_table=window.block_table,
                archive_table=self.block_table,
                slots=window.slots,
            )
        return self._batch


class PagesMetadataBuilder(AttentionMetadataBuilder[PagesMetadata]):
    """Builds the metadata of either group.

    Layers with archive pages of different sizes have builders of their own, but vLLM hands the
    same description of the step to all builders of a group: the first one's result is kept there.
    """

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: "VllmConfig", device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PagesMetadata:
        """Metadata of this step for the group; see the base class."""
        shared: PagesMetadata | None = common_attn_metadata.__dict__.get(_SHARED)
        if shared is None:
            shared = PagesMetadata.of_step(common_attn_metadata)
            common_attn_metadata.__dict__[_SHARED] = shared
        return shared
