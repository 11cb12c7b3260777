"""The attention backend as vLLM sees it, and the window module beside each attention layer."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from vllm_leank.core.layout import MAX_HEAD_DIM, CacheLayout
from vllm_leank.core.window import GRANULE, Window
from vllm_leank.serving.scheduler.specs import WindowSpec, archive_spec, window_spec
from vllm_leank.serving.settings import load_settings
from vllm_leank.serving.vllm.config import in_flight_tokens
from vllm_leank.serving.vllm.draft_model import is_draft

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder


class PagesBackend(AttentionBackend):
    """What the two cache groups have in common: page order and metadata."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Blocks outermost: pages of unequal size lie side by side within a block."""
        return (KVCacheLayout.BLHNC,)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(GRANULE)]

    @staticmethod
    def get_builder_cls() -> "type[AttentionMetadataBuilder]":
        from vllm_leank.serving.metadata import PagesMetadataBuilder

        return PagesMetadataBuilder


class LeanKBackend(PagesBackend):
    """`--attention-backend leank`: pruned archive and dense window.

    What cannot be served is refused by `checks` when vLLM's config is made; what vLLM asks here,
    per attention layer, gives the same answers.
    """

    @staticmethod
    def get_name() -> str:
        return "LEANK"

    @staticmethod
    def get_impl_cls() -> "type[AttentionImpl]":
        from vllm.config import get_current_vllm_config

        if is_draft(get_current_vllm_config()):
            from vllm_leank.serving.draft_impl import DraftImpl

            return DraftImpl
        from vllm_leank.serving.impl import LeanKImpl

        return LeanKImpl

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 32 == 0 and head_size <= MAX_HEAD_DIM

    @classmethod
    def supports_rswa(cls) -> bool:
        """True: `vllm.prompt_lengths` switches it on, for the prompt lengths alone."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


def layer_backend(layout: CacheLayout, window: Window) -> type[LeanKBackend]:
    """The backend of one layer, which knows the layer's pages.

    All carry one name, so that vLLM shares metadata between layers with equal specs.
    """

    class LayerLeanKBackend(LeanKBackend):
        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            assert isinstance(spec, FullAttentionSpec)
            block = layout.archive_block
            return archive_spec(spec, window, block, layout.archive_page_bytes)

    return LayerLeanKBackend


def draft_backend(vllm_config: "VllmConfig") -> type[LeanKBackend]:
    """The backend of a draft model's layers, which have window pages alone."""

    class DraftBackend(LeanKBackend):
        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            assert isinstance(spec, FullAttentionSpec)
            return _window_spec(spec, vllm_config)

    return DraftBackend


def _window_spec(base: FullAttentionSpec, vllm_config: "VllmConfig") -> WindowSpec:
    """Spec of the window pages of a layer that would have `base` without leank."""
    settings = load_settings(vllm_config)
    return window_spec(
        base,
        settings.window,
        archive_block=settings.plan.archive_block,
        in_flight=in_flight_tokens(vllm_config),
    )


class WindowBackend(PagesBackend):
    """The window group's side: it has pages and metadata, but nothing computes through it."""

    @staticmethod
    def get_name() -> str:
        return "LEANK_WINDOW"

    @staticmethod
    def get_impl_cls() -> "type[AttentionImpl]":
        raise NotImplementedError("window pages are read by the attention layer")


class WindowLayer(AttentionLayerBase):
    """Owner of one attention layer's window pages, known to vLLM as `<layer name>.window`.

    Args:
        attention: the attention layer.
        on_bind: called with the number of blocks when the pages are there.
    """

    def __init__(self, attention: Any, on_bind: Callable[[int], None] | None = None) -> None:
        self.num_heads = attention.num_heads
        self.kv_cache = torch.tensor([])
        self._attention = attention
        self._on_bind = on_bind

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Backend of the window group."""
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: "VllmConfig") -> WindowSpec:
        """Spec of this layer's window pages."""
        return _window_spec(self._attention.get_kv_cache_spec(vllm_config), vllm_config)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the layer's pages, `[num_blocks, num_kv_heads, 32, 2 * head_dim]`."""
        super().bind_kv_cache(kv_cache)
        if self._on_bind is not None:
            self._on_bind(len(kv_cache))
