"""A draft model beside the served one. For vLLM 0.32 and 0.33.

The block table's hook goes when vLLM's V1 runner asks for `kv_cache_gid`, as for other drafters.
"""

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig

from vllm_leank.serving.vllm.backend_name import is_selected


def has_draft(vllm_config: "VllmConfig") -> bool:
    """Whether a model of its own drafts for the served one."""
    speculation = vllm_config.speculative_config
    return speculation is not None and bool(speculation.uses_draft_model())


def is_draft(vllm_config: "VllmConfig") -> bool:
    """Whether this is the config that vLLM derives for the draft model."""
    if not has_draft(vllm_config):
        return False
    return vllm_config.model_config is vllm_config.speculative_config.draft_model_config


def draft_with(vllm_config: "VllmConfig", backend: Any) -> None:
    """Have the draft model use a backend, too: vLLM's V1 runner would pick one by itself."""
    vllm_config.speculative_config.attention_backend = backend


def hook_draft_tables() -> None:
    """Have vLLM's V1 runner give a draft model the block table of its own cache group.

    It gives that of the first group. Goes when it asks for `kv_cache_gid`, as for other drafters.
    """
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.spec_decode.draft_model import DraftModelProposer
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if "_leank_hooked" in GPUModelRunner.__dict__:
        return
    propose = GPUModelRunner.propose_draft_token_ids

    @functools.wraps(propose)
    def propose_draft_token_ids(self: Any, *args: Any) -> Any:
        if isinstance(self.drafter, DraftModelProposer) and is_selected(self.vllm_config):
            table = self.input_batch.block_table[self.drafter.kv_cache_gid]
            args = tuple(
                one.replace(block_table_tensor=table.get_device_tensor(one.num_reqs))
                if isinstance(one, CommonAttentionMetadata)
                else one
                for one in args
            )
        return propose(self, *args)

    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids
    GPUModelRunner._leank_hooked = True
