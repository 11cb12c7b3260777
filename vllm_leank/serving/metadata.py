"""A step's metadata: built once per cache group and step, shared by all layers of the group."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from vllm_leank.kernels.batch import MAX_DECODE_QUERIES, Batch
from vllm_leank.serving.settings import load_settings
from vllm_leank.serving.vllm.prompt_lengths import prompt_lengths, prompt_requests

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_SHARED = "_leank_metadata"
_EXACT_UNTIL = "_leank_exact_until"


@dataclass
class PagesMetadata(AttentionMetadata):
    """What one cache group contributes to a step; see `Batch` for the shared fields.

    Attributes:
        common: vLLM's description of the step, for this group.
        exact_until: `[num_reqs]`; zeros where prompts are read pruned, and where vLLM's V2 runner
            tells no lengths of prompts: for a draft model, which reads its window alone, and in
            dummy runs. Beside sliding layers and states, which exclude drafts, the latter archive
            nothing: then it lies behind all tokens.
        in_prompt: `[num_reqs]` or shorter, on the host; see `Batch`.
    """

    common: CommonAttentionMetadata
    exact_until: torch.Tensor
    in_prompt: torch.Tensor
    _batch: Batch | None = None

    def batch(self, archive_of: "Callable[[PagesMetadata], PagesMetadata]") -> Batch:
        """The step as kernels read it; `self` is the window group's part, for which `archive_of`
        finds the archive group's. Made by the first layer that asks, for all layers.
        """
        if self._batch is None:
            common, archive = self.common, archive_of(self)
            self._batch = Batch(
                query_start_loc=common.query_start_loc,
                query_start_loc_cpu=common.query_start_loc_cpu,
                seq_lens=common.seq_lens,
                exact_until=self.exact_until,
                window_table=common.block_table_tensor,
                archive_table=archive.common.block_table_tensor,
                slots=common.slot_mapping,
                in_prompt=self.in_prompt,
                max_query_len=common.max_query_len,
                max_seq_len=common.max_seq_len,
            )
        return self._batch


class PagesMetadataBuilder(AttentionMetadataBuilder[PagesMetadata]):
    """Builds the metadata of either group.

    Layers of a draft model may have builders of their own, but vLLM hands the same description of
    the step to all builders of a group: the first one's result can be found there. It holds the
    description, which therefore only points to it: a step's memory goes when the step is over, and
    not when Python next looks for circles.
    """

    # Decode kernels read lengths, tables and prompt lengths on the device, from tensors that stay
    # in place from step to step.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int | None

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: "VllmConfig", device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # What is decoded comes first; with more drafts than that a request is not.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.reorder_batch_threshold = min(self.reorder_batch_threshold or 1, MAX_DECODE_QUERIES)
        self._exact_until = shared_exact_until(vllm_config, device)
        settings = load_settings(vllm_config)
        self._exact = settings.window.exact
        mixed = settings.plan.sliding is not None or settings.plan.states is not None
        self._untold = vllm_config.model_config.max_model_len + 1 if mixed else 0

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PagesMetadata:
        """Metadata of this step for the group; see the base class."""
        shared: PagesMetadata | None = common_attn_metadata.__dict__.get(_SHARED, lambda: None)()
        if shared is None:
            exact_until = self._exact_until[: common_attn_metadata.num_reqs]
            in_prompt = prompt_requests(common_attn_metadata)
            lengths = prompt_lengths(common_attn_metadata)
            if not self._exact:
                in_prompt = in_prompt[:0]
            elif lengths is None:
                exact_until.fill_(self._untold)
            else:
                # Rows of padding, which have no prompt, have no tokens either.
                exact_until[: len(lengths)].copy_(lengths[: len(exact_until)], non_blocking=True)
            shared = PagesMetadata(common_attn_metadata, exact_until, in_prompt)
            common_attn_metadata.__dict__[_SHARED] = ref(shared)
        return shared

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> PagesMetadata:
        """Metadata of a draft model's step, which reads its window alone, in prompts too. Not kept:
        vLLM takes the same description for all steps and changes it in between.
        """
        zeros = torch.zeros_like(self._exact_until[: common_attn_metadata.num_reqs])
        return PagesMetadata(common_attn_metadata, zeros, torch.empty(0, dtype=torch.bool))


def shared_exact_until(vllm_config: "VllmConfig", device: Any) -> torch.Tensor:
    """Int32 `[max_num_seqs]`: one for all builders, as CUDA graphs hold its address."""
    attached: torch.Tensor | None = vllm_config.__dict__.get(_EXACT_UNTIL)
    if attached is None:
        padded = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(vllm_config.scheduler_config.max_num_seqs, padded)
        attached = torch.zeros(rows, dtype=torch.int32, device=device)
        vllm_config.__dict__[_EXACT_UNTIL] = attached
    return attached
