"""What vLLM asks of the two cache groups: page order, metadata, and the window's pages."""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from vllm_leank.core.window import GRANULE
from vllm_leank.serving.scheduler.specs import window_spec
from vllm_leank.serving.settings import load_settings
from vllm_leank.serving.vllm.config import in_flight_tokens

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionMetadataBuilder


class PagesBackend(AttentionBackend):
    """What the two cache groups have in common: page order and metadata."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Blocks outermost: an archive page lies where the window pages of all layers do."""
        return (KVCacheLayout.BLHNC,)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(GRANULE)]

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """No: which kernel takes a request is decided on the host, by how many queries it has."""
        return False

    @staticmethod
    def get_builder_cls() -> "type[AttentionMetadataBuilder]":
        from vllm_leank.serving.metadata import PagesMetadataBuilder

        return PagesMetadataBuilder


def window_backend(
    backend: type[AttentionBackend], vllm_config: "VllmConfig"
) -> type[AttentionBackend]:
    """A layer's backend as it asks for pages: attention layers own the window pages."""

    class WindowBackend(backend):
        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            assert isinstance(spec, FullAttentionSpec)
            settings = load_settings(vllm_config)
            in_flight = in_flight_tokens(vllm_config)
            return window_spec(spec, settings.plan, settings.window, in_flight)

    return WindowBackend
