"""One attention layer: store, compact, attend."""

from functools import partial
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_leank.core.layout import CacheLayout
from vllm_leank.core.options import OptionError
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.reference import FP8
from vllm_leank.serving.backend import WindowLayer, layer_backend
from vllm_leank.serving.metadata import PagesMetadata
from vllm_leank.serving.report import log_capacity
from vllm_leank.serving.settings import load_settings
from vllm_leank.serving.step import attend_layer
from vllm_leank.serving.vllm.config import layer_index


class LeanKImpl(AttentionImpl[PagesMetadata]):
    """Attention of one layer over its window and archive pages.

    Args are vLLM's, see `AttentionImpl`.

    Raises:
        OptionError: the layer's attention has a feature that pruned keys do not support.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        unsupported = {
            "ALiBi": alibi_slopes is not None,
            "sliding-window attention": sliding_window is not None,
            "a logits soft cap": bool(logits_soft_cap),
            "attention sink parameters": sinks is not None,
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "KV sharing between layers": kv_sharing_target_layer_name is not None,
        }
        for feature, present in unsupported.items():
            if present:
                raise OptionError(
                    f"leank does not support {feature}, which this model's attention uses; "
                    "serve it without --attention-backend leank"
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self._vllm_config = get_current_vllm_config()
        self._cache: LayerCache | None = None
        self._pages: list[tuple[int, torch.Size]] = []

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take the layer's part of the mask and give the layer its pages.

        Called by vLLM between loading the weights and asking for cache specs; only now does the
        layer stand in the forward context, where its name is found.
        """
        context = self._vllm_config.compilation_config.static_forward_context
        name, layer = self._find_layer()
        settings = load_settings(self._vllm_config)
        index, rank = layer_index(name), get_tensor_model_parallel_rank()
        self._window_name = f"{name}.window"
        self._window = settings.window
        self._layout = settings.plan.layer(index, rank)
        _check_layer(name, layer, self._layout)

        kept = [
            channel
            for head in settings.plan.rank_heads(rank)
            for channel in settings.mask.kept_channels(index, head)
        ]
        self._register_channels(layer, kept)
        layer.attn_backend = layer_backend(self._layout, self._window)
        if self._window_name not in context:
            report = None
            if not any(isinstance(other, WindowLayer) for other in context.values()):
                check_all_layers(context)
                report = partial(log_capacity, self._vllm_config)
            context[self._window_name] = WindowLayer(layer, report)

    def _find_layer(self) -> tuple[str, Any]:
        """The attention layer that this is the implementation of, and its name."""
        context = self._vllm_config.compilation_config.static_forward_context
        return next(
            (name, layer) for name, layer in context.items() if getattr(layer, "impl", 0) is self
        )

    def _register_channels(self, layer: Any, kept: list[int]) -> None:
        """Give the layer the kept channels of its heads, one head after the other."""
        device = self._vllm_config.device_config.device
        channels = torch.tensor(kept, dtype=torch.long, device=device)
        # A buffer, so that it moves, sleeps and wakes with the layer.
        layer.register_buffer("leank_channels", channels, persistent=False)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PagesMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a step's tokens, written to `output`.

        Args:
            layer: the attention layer.
            query: `[num_tokens, num_heads, head_dim]`.
            key: `[num_tokens, num_kv_heads, head_dim]`.
            value: like `key`.
            kv_cache: archive pages, `[num_blocks, 1, archive_block, bytes per token / itemsize]`,
                in the model's dtype whatever they hold.
            attn_metadata: the step; None while vLLM profiles memory.
            output: like `query`.
            output_scale: not supported.
            output_block_scale: not supported.
        """
        assert output_scale is None, "vLLM fuses output quantization without asking"
        if attn_metadata is None:
            return output.zero_()
        forward_context = get_forward_context()
        window_metadata = forward_context.attn_metadata[self._window_name]
        batch = attn_metadata.batch(window_metadata)
        window_pages = forward_context.no_compile_layers[self._window_name].kv_cache
        archive = self._archive(kv_cache)
        pages = [(part.data_ptr(), part.shape) for part in (archive, window_pages)]
        if self._cache is None or self._pages != pages:
            self._cache, self._pages = self._bind(layer, archive, window_pages), pages
        attend_layer(query, key, value, output, self._cache, batch, self.scale)
        return output

    def _archive(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """The archive pages: what vLLM knows as the layer's cache."""
        return kv_cache

    def _bind(self, layer: Any, archive: torch.Tensor, window_pages: torch.Tensor) -> LayerCache:
        """The layer's pages as kernels take them. vLLM allocates them more than once: a small pool
        to try CUDA graphs with, and the real one, perhaps at the same address.
        """
        archive_pages = archive.view(len(archive), -1)
        if self._layout.is_fp8:
            archive_pages = archive_pages.view(FP8)
        return LayerCache(
            window_pages=window_pages,
            archive_pages=archive_pages,
            layout=self._layout,
            channels=layer.leank_channels.split(self._layout.kept),
            window=self._window,
        )


def check_all_layers(context: dict[str, Any]) -> None:
    """Refuse a model whose code picked another backend for some layers: those would be dense.

    Args:
        context: vLLM's forward context, the model's layers by name.

    Raises:
        OptionError: names the first such layer.
    """
    for name, layer in context.items():
        if not isinstance(layer, AttentionLayerBase) or isinstance(layer, WindowLayer):
            continue
        if not isinstance(getattr(layer, "impl", None), LeanKImpl):
            raise OptionError(
                f"leank serves all layers or none, but {name} has a backend of its own; serve "
                "this model without --attention-backend leank"
            )


def _check_layer(name: str, layer: Any, layout: CacheLayout) -> None:
    """Refuse a layer that is not what the model's config, and so the mask, says."""
    expected = (len(layout.kept), layout.head_dim, layout.head_dim)
    found = (layer.num_kv_heads, layer.head_size, layer.head_size_v)
    if found != expected:
        raise OptionError(
            f"leank: {name} has KV heads, K and V head sizes {found}, but the mask is for "
            f"{expected}; serve this model without --attention-backend leank"
        )
