"""What FlashAttention computes, in plain PyTorch, for machines without a GPU."""

import torch
from torch import Tensor


def flash_attention(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
    fa_version: int,
    return_softmax_lse: bool,
) -> tuple[Tensor, Tensor]:
    """vLLM's `flash_attn_varlen_func`, not causal, of pages; see there. As it does, it reads pages
    to their end, and says `inf` (version 2) or `-inf` (3) of a query that sees nothing.
    """
    assert not causal
    assert return_softmax_lse
    starts = cu_seqlens_q.tolist()
    assert starts[0] == 0
    assert starts[-1] == len(q)
    page, group = k.shape[1], q.shape[1] // k.shape[2]
    lse = torch.full((q.shape[1], len(q)), float("inf" if fa_version == 2 else "-inf"))
    out.zero_()
    lengths = seqused_k.tolist()
    for i, (first, last, length) in enumerate(zip(starts[:-1], starts[1:], lengths, strict=True)):
        assert 0 < last - first <= max_seqlen_q
        assert 0 <= length <= max_seqlen_k
        if not length:
            continue
        pages = block_table[i, : -(-length // page)].long()
        key, value = (x[pages].flatten(0, 1).float().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[first:last].float(), key) * softmax_scale
        scores[..., length:] = float("-inf")
        lse[:, first:last] = scores.logsumexp(-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).to(out.dtype)
    return out, lse
