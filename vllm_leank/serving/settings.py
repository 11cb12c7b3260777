"""What a server runs with, attached to vLLM's config."""

from typing import TYPE_CHECKING, Any

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.layers import count_state_layers, sliding_layers
from vllm_leank.core.options import Options
from vllm_leank.core.pages import window_token_bytes
from vllm_leank.core.states import StateLayers
from vllm_leank.mask.lookup import resolve_mask
from vllm_leank.mask.settings import Settings, plan_settings
from vllm_leank.serving.vllm.config import stage_layers
from vllm_leank.serving.vllm.draft_model import has_draft
from vllm_leank.serving.vllm.states import state_bytes

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_ATTACHED = "_leank_settings"

MASK_KEY = "leank_mask_sha256"
"""Beside "leank" in vLLM's `additional_config`, set by us: vLLM keys its compile cache with that
dict, and the path of a mask, or none, says nothing of what the mask keeps."""


def resolve_settings(vllm_config: "VllmConfig", options: Options) -> Settings:
    """Read the mask and plan the cache.

    Raises:
        MaskError: no mask was found, or it is faulty or does not fit the model.
    """
    if _ATTACHED in _holder(vllm_config).__dict__:
        return load_settings(vllm_config)  # the config is derived from one that has them
    model = vllm_config.model_config
    overrides = model.hf_overrides if isinstance(model.hf_overrides, dict) else None
    geometry = Geometry.from_hf_config(model.hf_text_config)
    mask = resolve_mask(options.mask, model.model, geometry, overrides=overrides)
    served = set(mask.geometry.layers)
    return plan_settings(
        mask,
        options,
        model.dtype.itemsize,
        vllm_config.parallel_config.tensor_parallel_size,
        _draft_items(vllm_config),
        [len(served.intersection(stage)) for stage in stage_layers(vllm_config)],
        sliding_layers(model.hf_text_config),
        _state_layers(vllm_config),
    )


def attach_settings(vllm_config: "VllmConfig", settings: Settings) -> None:
    """Let settings travel with the config to every process, so that all ranks use one mask,
    whatever happens to the file meanwhile.
    """
    _holder(vllm_config).__dict__[_ATTACHED] = settings
    if isinstance(vllm_config.additional_config, dict):  # else it has a hash of its own
        vllm_config.additional_config = {
            **vllm_config.additional_config,
            MASK_KEY: settings.mask.sha256,
        }


def load_settings(vllm_config: "VllmConfig") -> Settings:
    """What `attach_settings` attached to the config."""
    settings: Settings = _holder(vllm_config).__dict__[_ATTACHED]
    return settings


def _state_layers(vllm_config: "VllmConfig") -> StateLayers | None:
    count = count_state_layers(vllm_config.model_config.hf_text_config)
    return StateLayers(count, state_bytes(vllm_config)) if count else None


def _holder(vllm_config: "VllmConfig") -> Any:
    """Where settings are attached: a part of the config that is shared by those which vLLM derives
    from it, for a draft model, or for the text part of a model that reads images as well. They are
    derived field by field, and attributes of the whole that are no fields are refused.
    """
    return vllm_config.speculative_config if has_draft(vllm_config) else vllm_config.cache_config


def _draft_items(vllm_config: "VllmConfig") -> int:
    """Elements of a dense token over all layers of the draft model, on each tensor-parallel rank; 0
    without one.
    """
    if not has_draft(vllm_config):
        return 0
    speculation = vllm_config.speculative_config
    draft = speculation.draft_model_config
    heads = draft.get_num_kv_heads(speculation.draft_parallel_config)
    layer = window_token_bytes(heads, draft.get_head_size(), itemsize=1)
    return int(draft.get_total_num_hidden_layers() * layer)
