"""The archive of a pipeline stage, as vLLM sees it: an entry beside the attention layers that owns
one page for all of them.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend

from vllm_leank.core.options import OptionError
from vllm_leank.core.pages import CacheLayout
from vllm_leank.core.window import Window
from vllm_leank.kernels.scratch import Scratch, needs_scratch
from vllm_leank.serving.page_backends import PagesBackend
from vllm_leank.serving.report import log_capacity
from vllm_leank.serving.scheduler.specs import ArchiveSpec, archive_spec
from vllm_leank.serving.settings import load_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionImpl


class ArchiveBackend(PagesBackend):
    """The archive group's side: it has pages and metadata, but nothing computes through it."""

    @staticmethod
    def get_name() -> str:
        return "LEANK_ARCHIVE"

    @staticmethod
    def get_impl_cls() -> "type[AttentionImpl]":
        raise NotImplementedError("archive pages are read by the attention layers")


class Archive(AttentionLayerBase):
    """Owner of the archive pages of all layers of this pipeline stage.

    Args:
        vllm_config: the server's config.

    Attributes:
        name: what vLLM knows it by: the stage's first layer and `archive`.
        is_taken: whether a layer is ready to ask for its part.
        kv_cache: the pages, `[num_blocks, 1, archive_block, bytes per token / itemsize]`, in the
            spec's dtype whatever they hold.
    """

    def __init__(self, vllm_config: "VllmConfig") -> None:
        plan = load_settings(vllm_config).plan
        self.name = f"layers.{plan.first_layers[get_pp_group().rank_in_group]}.archive"
        self.is_taken = False
        self.kv_cache = torch.tensor([])
        self._vllm_config = vllm_config
        self._scratch: Scratch | None = None
        self.num_heads = 1  # vLLM asks every layer

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Backend of the archive group."""
        return ArchiveBackend

    def get_kv_cache_spec(self, vllm_config: "VllmConfig") -> ArchiveSpec:
        """Spec of the stage's archive pages, the same on all stages and ranks.

        Raises:
            OptionError: vLLM loaded the weights without telling the layers.
        """
        if not self.is_taken:
            raise OptionError(
                f"leank: with --load-format {vllm_config.load_config.load_format} vLLM does not "
                "tell attention layers that their weights are there; use another load format"
            )
        settings = load_settings(vllm_config)
        return archive_spec(settings.plan, settings.window, vllm_config.model_config.dtype)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the stage's pages."""
        super().bind_kv_cache(kv_cache)
        log_capacity(self._vllm_config, len(kv_cache))

    def part(self, offset: int, layout: CacheLayout, dtype: torch.dtype) -> torch.Tensor:
        """A layer's part of the pages, `[num_blocks, items]` of a dtype, which begins `offset`
        bytes into each.
        """
        pages = self.kv_cache.view(len(self.kv_cache), -1).view(torch.uint8)
        return pages[:, offset : offset + layout.archive_page_bytes].view(dtype)

    def scratch(
        self, layout: CacheLayout, window: Window, query_heads: int, device: torch.device
    ) -> Scratch | None:
        """Room for far tokens that are unpacked for prompts, one for all layers of the stage; None
        where none are. Made while the model is loaded, so that vLLM counts it with the weights.

        Args:
            layout: of any of the layers.
            window: the dense window.
            query_heads: of a layer, on this rank.
            device: of the layers.
        """
        config = self._vllm_config
        longest = config.model_config.max_model_len
        if self._scratch is None and needs_scratch(layout, window, longest):
            self._scratch = Scratch.allocate(
                layout,
                query_heads,
                far=window.boundary(longest) - window.sink,
                step=config.scheduler_config.max_num_batched_tokens,
                dtype=config.model_config.dtype,
                device=device,
            )
        return self._scratch


def stage_archive(vllm_config: "VllmConfig", context: dict[str, Any]) -> Archive:
    """The archive of this process's stage; made and told to vLLM by the first layer that asks.

    Layers ask before vLLM knows them, so the archive comes first among the cache groups, and vLLM
    looks prefixes up there first.

    Args:
        vllm_config: the server's config.
        context: vLLM's layers by name.
    """
    known = next((layer for layer in context.values() if isinstance(layer, Archive)), None)
    if known is None:
        known = Archive(vllm_config)
        context[known.name] = known
    return known
