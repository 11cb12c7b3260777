"""FlashAttention decode as vLLM runs it: what `leank bench attention` is measured against."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from vllm.vllm_flash_attn import (
    flash_attn_varlen_func,
    get_scheduler_metadata,
    is_fa_version_supported,
)

from vllm_leank.bench.cases import Case
from vllm_leank.bench.pools import fill_normal
from vllm_leank.core.capacity import EIGHT_BIT_CACHE
from vllm_leank.core.pages import pages

BLOCK = 16
"""Tokens of a page: vLLM's default with this backend."""

FLASH = "flash"
FLASH_EIGHT_BIT = f"flash_{EIGHT_BIT_CACHE}"
"""What results call FlashAttention over the model's dtype and over 8-bit floats."""

GRAPH_SPLITS = 32
"""Most splits under CUDA graphs: vLLM's `flash_attn_max_num_splits_for_cuda_graph`."""


def flash_version() -> int:
    """3 on GPUs that have it, else 2."""
    return 3 if is_fa_version_supported(3) else 2


@dataclass(frozen=True)
class FlashDecode:
    """Dense pages of one layer and queries on them, for `copies` disjoint sets of requests.

    Attributes:
        version: of FlashAttention; 8-bit floats need 3.
        case: the requests.
        query: `[batch, num_heads, head_dim]`; of 8-bit floats with such pages, as vLLM quantizes
            it beforehand.
        output: like `query`, in the model's dtype.
        kv_pages: `[num_pages, 16, num_kv_heads, 2 * head_dim]`, K then V.
        block_tables: one `[batch, pages of a request]` per copy.
    """

    version: int
    case: Case
    query: torch.Tensor
    output: torch.Tensor
    kv_pages: torch.Tensor
    block_tables: list[torch.Tensor]

    @classmethod
    def random(
        cls,
        case: Case,
        query: torch.Tensor,
        num_kv_heads: int,
        copies: int,
        *,
        eight_bit: bool,
    ) -> "FlashDecode":
        """Random pages in random order for queries `[batch, num_heads, head_dim]`."""
        device, dtype = query.device, torch.float8_e4m3fn if eight_bit else query.dtype
        width = pages(case.length, BLOCK)
        rows = copies * case.batch
        table = torch.randperm(rows * width, device=device).int().view(rows, width)
        shape = (rows * width, BLOCK, num_kv_heads, 2 * query.shape[-1])
        kv_pages = fill_normal(torch.empty(shape, dtype=dtype, device=device))
        return cls(
            flash_version(),
            case,
            query.to(dtype),
            torch.empty_like(query),
            kv_pages,
            list(table.split(case.batch)),
        )

    def calls(self, *, graph: bool) -> list[Callable[[], object]]:
        """A call for each copy, with the number of splits that vLLM sets in graphs and without."""
        batch, num_heads, head_dim = self.query.shape
        keys, values = self.kv_pages.split(head_dim, dim=-1)
        num_kv_heads, device = keys.shape[2], self.query.device
        lengths = torch.full((batch,), self.case.length, dtype=torch.int32, device=device)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        one = torch.ones((), device=device).expand(batch, num_kv_heads)
        scale = dict.fromkeys(("q", "k", "v"), one if self.is_eight_bit else None)
        splits, metadata = 0, None
        if self.version == 3:
            splits = GRAPH_SPLITS if graph else 0
            metadata = get_scheduler_metadata(
                batch_size=batch,
                max_seqlen_q=1,
                max_seqlen_k=self.case.length,
                num_heads_q=num_heads,
                num_heads_kv=num_kv_heads,
                headdim=head_dim,
                cache_seqlens=lengths,
                qkv_dtype=self.query.dtype,
                cu_seqlens_q=starts,
                page_size=BLOCK,
                causal=True,
                window_size=(-1, -1),
                num_splits=splits,
            )

        def call(block_table: torch.Tensor) -> object:
            return flash_attn_varlen_func(
                q=self.query,
                k=keys,
                v=values,
                out=self.output,
                cu_seqlens_q=starts,
                max_seqlen_q=1,
                seqused_k=lengths,
                max_seqlen_k=self.case.length,
                softmax_scale=head_dim**-0.5,
                causal=True,
                block_table=block_table,
                scheduler_metadata=metadata,
                fa_version=self.version,
                q_descale=scale["q"],
                k_descale=scale["k"],
                v_descale=scale["v"],
                num_splits=splits,
            )

        return [partial(call, table) for table in self.block_tables]

    def expected(self, row: int) -> torch.Tensor:
        """What request `row` of the last copy should get, fp32 `[num_heads, head_dim]`."""
        tokens = self.kv_pages[self.block_tables[-1][row].long()].flatten(0, 1)[: self.case.length]
        key, value = tokens.float().transpose(0, 1).chunk(2, dim=-1)
        query = self.query[row].float().unflatten(0, (key.shape[0], -1))
        weights = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
        return (weights @ value).flatten(0, 1)

    @property
    def is_eight_bit(self) -> bool:
        """Whether K and V are 8-bit floats."""
        return self.kv_pages.dtype == torch.float8_e4m3fn
