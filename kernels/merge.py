"""Puts together what queries found in different tokens."""

import torch
import triton
import triton.language as tl
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.common import LOG2_E
from vllm_leank.kernels.launcher import Launch

ROWS = 16
"""Tokens of a program."""


@triton.jit
def take_in(m, l, acc, lse, p_found, mask):
    """Take what queries found in other tokens into a running softmax.

    m, l: `[M]`; acc: `[M, D_PAD]`; lse: `[M]`, the log-sum-exp of the other tokens' scores, in
    units of log2. That of no token is `inf` for FlashAttention 2 and `-inf` for 3.
    p_found: `[M, D_PAD]`, where the attention to them lies; mask: which of it exists.
    """
    lse = tl.where(lse == float("inf"), float("-inf"), lse)
    m_new = tl.maximum(m, lse)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha, weight = tl.exp2(m - m_safe), tl.exp2(lse - m_safe)
    found = tl.load(p_found, mask=mask & (weight > 0)[:, None], other=0.0).to(tl.float32)
    return m_new, l * alpha + weight, acc * alpha[:, None] + found * weight[:, None]


@triton.jit(do_not_specialize=["tokens", "stride_lse", "stride_other_lse"])
def _merge_kernel(
    output_ptr, lse_ptr, other_ptr, other_lse_ptr, new_lse_ptr,
    tokens, stride_lse, stride_other_lse,
    stride_o_token, stride_o_head, stride_other_token, stride_other_head,
    D: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    o_m = tl.program_id(0) * M + tl.arange(0, M)
    head = tl.program_id(1)
    o_d = tl.arange(0, D_PAD)
    m_m = o_m < tokens
    m_md = m_m[:, None] & (o_d < D)[None, :]
    token = o_m.to(tl.int64)
    p_output = output_ptr + token * stride_o_token + head * stride_o_head
    p_output = p_output[:, None] + o_d[None, :]
    p_other = other_ptr + token * stride_other_token + head * stride_other_head
    p_other = p_other[:, None] + o_d[None, :]
    nothing = float("-inf")
    lse = tl.load(lse_ptr + head * stride_lse + o_m, mask=m_m, other=nothing)
    other_lse = tl.load(other_lse_ptr + head * stride_other_lse + o_m, mask=m_m, other=nothing)
    m = tl.full([M], nothing, tl.float32)
    l = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D_PAD], tl.float32)
    m, l, acc = take_in(m, l, acc, lse * LOG2_E, p_output, m_md)
    m, l, acc = take_in(m, l, acc, other_lse * LOG2_E, p_other, m_md)
    seen = l > 0
    l = tl.where(seen, l, 1.0)
    tl.store(p_output, (acc / l[:, None]).to(output_ptr.dtype.element_ty), mask=m_md)
    new_lse = tl.where(seen, (m + tl.log2(l)) / LOG2_E, nothing)
    tl.store(new_lse_ptr + head * stride_lse + o_m, new_lse, mask=m_m)


def merge(
    output: torch.Tensor,
    lse: torch.Tensor,
    other: torch.Tensor,
    other_lse: torch.Tensor,
    cache: LayerCache,
) -> torch.Tensor:
    """Take what queries found in other tokens into what they found before, in place.

    Args:
        output: `[num_tokens, num_heads, head_dim]`, attention to the tokens of before.
        lse: fp32 `[num_heads, num_tokens]`, the log-sum-exp of their scores; `inf` or `-inf` where
            there are none.
        other: like `output`, to other tokens.
        other_lse: like `lse`.
        cache: of the layer, which keeps the launch.

    Returns:
        The log-sum-exp of all of these scores, like `lse`.
    """
    new_lse = torch.empty_like(lse)
    tokens, heads, head_dim = output.shape
    launch = cache.prepared(_prepare, head_dim, output.stride(), other.stride())
    launch(
        (triton.cdiv(tokens, ROWS), heads, 1),
        output, lse, other, other_lse, new_lse, tokens, lse.stride(0), other_lse.stride(0),
    )  # fmt: skip
    return new_lse


def _prepare(
    cache: LayerCache, head_dim: int, output: tuple[int, ...], other: tuple[int, ...]
) -> Launch:
    return Launch(
        _merge_kernel,
        ("output_ptr", "lse_ptr", "other_ptr", "other_lse_ptr", "new_lse_ptr", "tokens",
         "stride_lse", "stride_other_lse"),
        stride_o_token=output[0],
        stride_o_head=output[1],
        stride_other_token=other[0],
        stride_other_head=other[1],
        D=head_dim,
        D_PAD=triton.next_power_of_2(head_dim),
        M=ROWS,
        num_warps=4,
    )  # fmt: skip
