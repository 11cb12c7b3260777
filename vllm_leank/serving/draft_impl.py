"""One attention layer of a draft model, whose guesses the served model checks.

No mask is needed for one. Its heads keep no channel, in the prompt as well, so it has no archive: a
far token costs it nothing, and a guess made without far tokens is checked like any other.
"""

from dataclasses import replace

import torch

from vllm_leank.core.pages import LEAST_BLOCK, CacheLayout
from vllm_leank.core.profile import Profile
from vllm_leank.kernels.channels import first_channels
from vllm_leank.serving.impl import LeanKImpl
from vllm_leank.serving.metadata import PagesMetadata
from vllm_leank.serving.settings import load_settings
from vllm_leank.serving.vllm.draft_model import hook_draft_tables


class DraftImpl(LeanKImpl):
    """Attention of a draft model's layer over its dense window, which is all it has.

    Args are vLLM's, see `AttentionImpl`.
    """

    def _take_archive(self) -> None:
        return None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Give the layer its pages; see the base class."""
        hook_draft_tables()
        _, layer = self._find_layer()
        self._window = replace(load_settings(self._vllm_config).window, exact=False)
        self._layout = CacheLayout(
            profiles=(Profile(),) * layer.num_kv_heads,
            head_dim=layer.head_size,
            itemsize=self._vllm_config.model_config.dtype.itemsize,
            archive_block=LEAST_BLOCK,
        )
        self._take_pages(layer, first_channels(self._layout), self._layout)

    def _archive_metadata(self, window: PagesMetadata) -> PagesMetadata:
        return window

    def _archive_pages(self, dtype: torch.dtype) -> torch.Tensor:
        """One page that nobody reads: kernels take one whatever the heads keep."""
        device = self._vllm_config.device_config.device
        return torch.zeros((1, 256 * LEAST_BLOCK), dtype=dtype, device=device)
