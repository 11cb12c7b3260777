"""Draft models: small models whose guesses the served model checks.

No mask is needed for one. Its layers keep their dense window alone, as heads do that keep no
channel, in the prompt as well: a far token costs it nothing, and a guess made without far tokens is
checked like any other.
"""

from typing import TYPE_CHECKING

from vllm_leank.layout import window_token_bytes

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def has_draft(vllm_config: "VllmConfig") -> bool:
    """Whether a model of its own drafts for the served one."""
    speculation = vllm_config.speculative_config
    return speculation is not None and bool(speculation.uses_draft_model())


def is_draft(vllm_config: "VllmConfig") -> bool:
    """Whether this is the config that vLLM derives for the draft model."""
    if not has_draft(vllm_config):
        return False
    return vllm_config.model_config is vllm_config.speculative_config.draft_model_config


def draft_items(vllm_config: "VllmConfig") -> int:
    """Elements of a dense token over all layers of the draft model, on each tensor-parallel rank; 0
    without one.
    """
    if not has_draft(vllm_config):
        return 0
    speculation = vllm_config.speculative_config
    draft = speculation.draft_model_config
    heads = draft.get_num_kv_heads(speculation.draft_parallel_config)
    return int(
        draft.get_total_num_hidden_layers()
        * window_token_bytes(heads, draft.get_head_size(), itemsize=1)
    )
