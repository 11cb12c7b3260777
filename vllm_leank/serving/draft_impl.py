"""One attention layer of a draft model, whose guesses the served model checks.

No mask is needed for one. Its heads keep no channel, in the prompt as well, so it has no archive: a
far token costs it nothing, and a guess made without far tokens is checked like any other.
"""

from dataclasses import replace

import torch

from vllm_leank.core.layout import TOKEN_BYTES_UNIT, WINDOW_BLOCK, CacheLayout
from vllm_leank.serving.backend import draft_backend
from vllm_leank.serving.impl import LeanKImpl
from vllm_leank.serving.settings import load_settings
from vllm_leank.serving.vllm.draft_model import hook_draft_tables


class DraftImpl(LeanKImpl):
    """Attention of a draft model's layer over its dense window, which is all it has.

    Args are vLLM's, see `AttentionImpl`.
    """

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Give the layer its pages; see the base class."""
        hook_draft_tables()
        name, layer = self._find_layer()
        itemsize = self._vllm_config.model_config.dtype.itemsize
        self._window_name = name
        self._window = replace(load_settings(self._vllm_config).window, exact=False)
        self._layout = CacheLayout(
            kept=(0,) * layer.num_kv_heads,
            head_dim=layer.head_size,
            itemsize=itemsize,
            archive_itemsize=itemsize,
            archive_block=WINDOW_BLOCK,
            archive_page_bytes=WINDOW_BLOCK * TOKEN_BYTES_UNIT,
        )
        self._register_channels(layer, [])
        layer.attn_backend = draft_backend(self._vllm_config)
        self._no_archive: torch.Tensor | None = None

    def _archive(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """One page that nobody reads: kernels take one whatever the heads keep."""
        if self._no_archive is None:
            self._no_archive = kv_cache.new_zeros((1, self._layout.archive_page_items))
        return self._no_archive
