"""What vLLM's config says where it does not say it plainly. For vLLM 0.32 and 0.33."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig


def cache_dtype(vllm_config: "VllmConfig") -> "torch.dtype":
    """Dtype that vLLM would give the KV cache, by its flag or by the checkpoint's own scheme.

    An attention layer turns `auto` to 8-bit floats where a quantised checkpoint brings KV scales.
    """
    import torch
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

    model, flag = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    quantization = getattr(model.hf_config, "quantization_config", None) or {}
    if flag == "auto" and quantization.get("kv_cache_scheme"):
        return torch.float8_e4m3fn
    return kv_cache_dtype_str_to_dtype(flag, model)


def layer_index(layer_name: str) -> int:
    """Decoder layer of an attention layer, from its name."""
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(layer_name))


def in_flight_tokens(vllm_config: "VllmConfig") -> int:
    """Tokens of a request that are scheduled and not yet computed, at most."""
    return int(vllm_config.max_in_flight_tokens + vllm_config.num_lookahead_tokens)


def stage_layers(vllm_config: "VllmConfig") -> tuple[range, ...]:
    """Decoder layers of each pipeline stage."""
    from vllm.distributed.utils import get_pp_indices

    layers = vllm_config.model_config.get_total_num_hidden_layers()
    size = vllm_config.parallel_config.pipeline_parallel_size
    return tuple(range(*get_pp_indices(layers, rank, size)) for rank in range(size))


def most_decode_rows(vllm_config: "VllmConfig") -> int:
    """How many queries a step may decode, padding included, so that kernels are compiled for all of
    them. Any request may bring `MAX_DECODE_QUERIES`: drafts, or the rest of a prompt.
    """
    from vllm_leank.kernels.batch import MAX_DECODE_QUERIES

    scheduler = vllm_config.scheduler_config
    each = max(1 + vllm_config.num_speculative_tokens, MAX_DECODE_QUERIES)
    padded = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    queries = min(scheduler.max_num_seqs * each, scheduler.max_num_batched_tokens)
    return int(max(queries, padded))
