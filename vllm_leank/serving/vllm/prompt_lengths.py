"""Prompt lengths in a step's metadata. For vLLM 0.32 and 0.33.

Goes when the metadata always has them.
"""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


def request_prompt_lengths(vllm_config: "VllmConfig") -> None:
    """Have vLLM's runners put prompt lengths into the metadata of a step.

    They do so for models with Reference Sliding Window Attention, that is, where `rswa_window` is
    set; only attention backends look at its value. Goes when the metadata always has them.
    """
    vllm_config.model_config.model_arch_config.rswa_window = 1
    assert vllm_config.model_config.rswa_window is not None, "vLLM renamed rswa_window"


def prompt_lengths(common: "CommonAttentionMetadata") -> "torch.Tensor | None":
    """Prompt length of each request of a step, int `[num_reqs]`; None in dummy runs."""
    return common.rswa_prefix_lens


def prompt_requests(common: "CommonAttentionMetadata") -> "torch.Tensor":
    """Whether each request of a step may be in its prompt, bool on the host, `[num_reqs]` without
    padding; empty in dummy runs.
    """
    import torch

    if common.is_prefilling is None:
        return torch.empty(0, dtype=torch.bool)
    assert common.is_prefilling.device.type == "cpu", "vLLM moved is_prefilling to the device"
    return common.is_prefilling
