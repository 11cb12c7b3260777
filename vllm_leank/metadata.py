"""A step's metadata: built once per cache group and step, shared by all layers of the group."""

from dataclasses import dataclass
from functools import cached_property
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
    """What one cache group contributes to a step.

    Attributes:
        common: vLLM's description of the step, for this group.
    """

    common: CommonAttentionMetadata

    @cached_property
    def exact_until(self) -> torch.Tensor:
        """Prompt lengths, int `[num_reqs]`; zeros in vLLM's dummy runs, which have no prompts."""
        lengths = prompt_lengths(self.common)
        return torch.zeros_like(self.common.seq_lens) if lengths is None else lengths

    def batch(self, window: "PagesMetadata") -> Batch:
        """The step as kernels read it; `self` is the archive group's part. Made by the first layer
        that asks, for all layers.
        """
        batch: Batch | None = self.__dict__.get("_batch")
        if batch is None:
            batch = self.__dict__["_batch"] = Batch(
                query_start_loc=self.common.query_start_loc_cpu,
                seq_lens=self.common.seq_lens,
                exact_until=self.exact_until,
                window_table=window.common.block_table_tensor,
                archive_table=self.common.block_table_tensor,
                slots=window.common.slot_mapping,
            )
        return batch


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
            shared = PagesMetadata(common_attn_metadata)
            common_attn_metadata.__dict__[_SHARED] = shared
        return shared
