"""vLLM's kernel for `int4_per_token_head`, as it launches it and with more rows; prints by how much
outputs differ, and the rows of each launch. Triton's interpreter runs it: vLLM keeps Triton away
where there is no GPU, so it is given it here.
"""

import json

import torch
import triton
import triton.language as tl
import vllm.triton_utils as triton_of_vllm

triton_of_vllm.triton, triton_of_vllm.tl = triton, tl

from real.int4_rows import WithRows  # noqa: E402
from vllm.v1.attention.ops import int4_per_token_head as int4  # noqa: E402

BLOCK, KV_HEADS, HEADS, HEAD_DIM = 16, 1, 6, 32
LENGTHS, QUERIES = (40, 35, 20), (17, 1, 20)
"""Of three requests: a chunk that follows others, a token, and a prompt."""


class Told:
    """A kernel that tells its rows."""

    def __init__(self, kernel, rows):
        self._kernel, self._rows = kernel, rows

    def __getitem__(self, grid):
        def launch(num_warps=None, **arguments):
            self._rows.append(arguments["BLOCK_M"])
            self._kernel[grid](**arguments)

        return launch


def attention(lengths, queries):
    """Outputs `[queries, heads, head_dim]` for a cache of random tokens."""
    torch.manual_seed(0)
    table = torch.arange(len(lengths) * 8, dtype=torch.int32).view(len(lengths), 8)
    shape = table.numel(), BLOCK, KV_HEADS
    key_cache = torch.zeros((*shape, HEAD_DIM // 2), dtype=torch.uint8)
    value_cache, scales = key_cache.clone(), torch.zeros((2, *shape))
    slots = [table[i].long() * BLOCK for i in range(len(lengths))]
    slots = torch.cat(
        [
            (first[:, None] + torch.arange(BLOCK)).flatten()[:n]
            for first, n in zip(slots, lengths, strict=True)
        ]
    )
    key, value = torch.randn(2, len(slots), KV_HEADS, HEAD_DIM)
    int4.reshape_and_cache_int4(
        key, value, key_cache, value_cache, slots, k_scale_cache=scales[0], v_scale_cache=scales[1]
    )
    query = torch.randn(sum(queries), HEADS, HEAD_DIM)
    out = torch.empty_like(query)
    int4.unified_attention_int4(
        q=query, k_cache=key_cache, v_cache=value_cache, out=out,
        cu_seqlens_q=torch.tensor((0, *queries)).cumsum(0).int(), max_seqlen_q=max(queries),
        seqused_k=torch.tensor(lengths).int(), max_seqlen_k=max(lengths),
        softmax_scale=HEAD_DIM**-0.5, window_size=(-1, -1), block_table=table, softcap=0.0,
        sinks=None, alibi_slopes=None, use_alibi_sqrt=False, qq_bias=None, output_scale=None,
        mm_prefix_range=None, k_scale_cache=scales[0], v_scale_cache=scales[1],
        seq_threshold_3D=None, num_par_softmax_segments=None, softmax_segm_output=None,
        softmax_segm_max=None, softmax_segm_expsum=None,
    )  # fmt: skip
    return out


def main():
    """Compare."""
    kernel, rows = int4._attn_packed, []
    steps = (LENGTHS, QUERIES), (LENGTHS, (1, 1, 1))
    int4._attn_packed = Told(kernel, rows)
    narrow = [attention(*step) for step in steps]
    int4._attn_packed = WithRows(Told(kernel, rows), 64)
    wide = [attention(*step) for step in steps]
    differ = [(a - b).abs().max().item() for a, b in zip(narrow, wide, strict=True)]
    print(json.dumps({"differ": differ, "rows": rows, "largest": narrow[0].abs().max().item()}))


main()
