"""Attention of sliding layers beside served ones: vLLM's own, on pages in the order that leank's
have.

vLLM's kernels load whole tiles, and give keys that a query may not read a weight of 0. That is no
help against a NaN, and codes of an archive may look like one. So these layers must find numbers in
every slot of their pages: new blocks come zeroed (`specs.archive_spec`), and for what lies before a
window they read the window's first page, as the pages that were there may be others' by now.
"""

from functools import cache
from typing import Any

import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_leank.core.pages import LEAST_BLOCK
from vllm_leank.serving.vllm.zeroed_blocks import zero_sliding_blocks


@cache
def sliding_backend(path: str) -> str:
    """Path of a backend that differs from vLLM's at `path` in its pages, and in planning no steps.

    A pool has one page order, and these layers' pages lie beside those of served ones. vLLM's CPU
    backend does not offer that order, but its kernels take pages by their strides.
    """
    base: Any = resolve_obj_by_qualname(path)

    class SlidingBackend(base):
        @classmethod
        def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
            return (KVCacheLayout.BLHNC,)

        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
            return [LEAST_BLOCK]

        @staticmethod
        def get_builder_cls() -> Any:
            return _builder(base.get_builder_cls())

    name = f"Sliding{base.__name__}"
    SlidingBackend.__name__ = SlidingBackend.__qualname__ = name
    globals()[name] = SlidingBackend
    return f"{__name__}.{name}"


def _builder(base: Any) -> Any:
    class SlidingBuilder(base):
        supports_update_block_table = False  # or groups after the first would not be built

        def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(kv_cache_spec, *args, **kwargs)
            # The window is the layers' own; `rswa_window` is our way to prompt lengths.
            self.rswa_window = None
            # FlashAttention plans a step by its longest request, but a graph is captured with the
            # longest that there may be. A step whose requests all fit into the window is planned
            # as if there were none, and the graph takes that plan for another one. vLLM drops it
            # as well where it sees full attention beside sliding layers.
            self.aot_schedule = False
            self._leank_window = kv_cache_spec.sliding_window
            if self.device.type == "cpu":
                zero_sliding_blocks()

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            hide_left_pages(common_attn_metadata, self._leank_window)
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

    return SlidingBuilder


def hide_left_pages(common: CommonAttentionMetadata, window: int) -> None:
    """Have a step's block table name the first page of each request's window for all before it.

    In place, as CUDA graphs hold the table's address. vLLM writes the table anew for each step, or
    keeps what is written here, which the request's later steps do not read either.
    """
    table = common.block_table_tensor  # [num_reqs, pages]
    starts = common.query_start_loc[: len(table) + 1]
    tokens = common.seq_lens[: len(table)] - starts.diff() - (window - 1)
    first = (tokens // LEAST_BLOCK).clamp(0, table.shape[1] - 1)[:, None]
    own = table.gather(1, first.long())
    page = torch.arange(table.shape[1], dtype=torch.int32, device=table.device)
    table.copy_(torch.where(page < first, own, table))
