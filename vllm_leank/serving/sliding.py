"""Attention of sliding layers beside served ones: vLLM's own, on pages in the order that leank's
have.

vLLM's kernels load whole tiles, and give keys that a query may not read a weight of 0. That is no
help against a NaN, and codes of an archive may look like one. So these layers must find numbers in
every slot of their pages: new blocks come zeroed (`specs.archive_spec`), and what lies before a
window is read from the pool's null block.
"""

from functools import cache
from typing import Any

import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_leank.core.pages import LEAST_BLOCK
from vllm_leank.serving.vllm.zeroed_blocks import zero_sliding_blocks

NULL_BLOCK = 0
"""Of vLLM's pool: never given to anyone, and full of zeros."""


@cache
def sliding_backend(path: str) -> str:
    """Path of a backend that differs from vLLM's at `path` in its pages alone.

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
    """Have a step's block table name the null block for pages that lie before every window.

    In place, as CUDA graphs hold the table's address. vLLM writes the table anew for each step, or
    keeps what is written here, which the request's later steps do not read either.
    """
    table = common.block_table_tensor  # [num_reqs, pages]
    starts = common.query_start_loc[: len(table) + 1]
    first = common.seq_lens[: len(table)] - starts.diff() - (window - 1)
    page = torch.arange(table.shape[1], dtype=torch.int32, device=table.device)
    table.masked_fill_(page < (first // LEAST_BLOCK)[:, None], NULL_BLOCK)
