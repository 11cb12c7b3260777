"""Gated delta nets in fp32 for engines on CPU, whose own kernels compute in bfloat16 alone: what
transformers computes, on vLLM's states.
"""

import torch
from torch.nn.functional import conv1d, silu, softplus
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import register_cpu_gdn_attention_ops
from vllm.utils.torch_utils import _resolve_layer_name


def use_fp32(monkeypatch):
    """Have eager engines use it, for models of any dtype."""
    register_cpu_gdn_attention_ops()
    monkeypatch.setattr(torch.ops.vllm, "cpu_gdn_attention_core", _core)


def _core(
    mixed_qkv: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    core_attn_out: torch.Tensor,
    layer_name: str,
) -> None:
    """vLLM's operation of that name, for steps without drafts: of each request in turn."""
    name, context = _resolve_layer_name(layer_name), get_forward_context()
    if context.attn_metadata is None:
        return  # a trial run
    layer, step = context.no_compile_layers[name], context.attn_metadata[name]
    starts = step.non_spec_query_start_loc.tolist()
    slots = step.non_spec_state_indices_tensor.tolist()
    goes_on = [True] * len(slots)
    if step.has_initial_state is not None:
        goes_on = step.has_initial_state.tolist()
    conv, recurrent = layer.kv_cache
    heads = layer.num_v_heads // layer.tp_size
    state_shape = (1, heads, layer.head_k_dim, layer.head_v_dim)
    for request in range(step.num_decodes + step.num_prefills):
        rows, slot = slice(starts[request], starts[request + 1]), slots[request]
        before = conv[slot].T if goes_on[request] else torch.zeros_like(conv[slot].T)
        x = torch.cat([before, mixed_qkv[rows].T], dim=1)
        conv[slot] = x[:, -before.shape[1] :].T
        x = silu(conv1d(x, layer.conv1d.weight, groups=len(x))).T
        query, key, value = layer.rearrange_mixed_qkv(x)
        repeats = heads // key.shape[2]
        log_decay = -layer.A_log.exp() * softplus(a[rows] + layer.dt_bias)
        one_token = len(x) == 1
        rule = torch_recurrent_gated_delta_rule if one_token else torch_chunk_gated_delta_rule
        output, state = rule(
            query.repeat_interleave(repeats, dim=2),
            key.repeat_interleave(repeats, dim=2),
            value,
            g=log_decay[None],
            beta=b[rows].sigmoid()[None],
            initial_state=recurrent[slot].view(state_shape) if goes_on[request] else None,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        recurrent[slot] = state.view(recurrent[slot].shape)
        core_attn_out[rows] = output[0]
