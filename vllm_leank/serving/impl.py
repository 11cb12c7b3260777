"""One attention layer: store, compact, attend."""

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.options import OptionError
from vllm_leank.core.pages import CacheLayout
from vllm_leank.core.selection import Selection
from vllm_leank.core.states import StateLayers
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.channels import LayerChannels, layer_channels
from vllm_leank.kernels.codecs import codec_of
from vllm_leank.kernels.scratch import Scratch
from vllm_leank.serving.archive import Archive, stage_archive
from vllm_leank.serving.metadata import PagesMetadata
from vllm_leank.serving.page_backends import window_backend
from vllm_leank.serving.settings import load_settings
from vllm_leank.serving.step import attend_layer
from vllm_leank.serving.vllm.config import layer_index, most_decode_rows
from vllm_leank.serving.vllm.states import is_state

logger = init_logger("vllm.leank.impl")

_CACHE = "_leank_cache"
"""Attribute of a layer's window pages that holds its pages as kernels take them."""


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
        self._sink_scores = sinks
        self._vllm_config = get_current_vllm_config()
        self._context = self._vllm_config.compilation_config.static_forward_context
        self._archive = self._take_archive()
        self._scratch: Scratch | None = None
        self._selection: Selection | None = None
        self._asks_for_pages = False

    def _take_archive(self) -> Archive | None:
        """The archive of the layer's stage, made known to vLLM."""
        return stage_archive(self._vllm_config, self._context)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take the layer's part of the mask and of the archive's pages.

        Called by vLLM between loading the weights and asking for cache specs; only now does the
        layer stand in the forward context, where its name is found.
        """
        name, layer = self._find_layer()
        settings = load_settings(self._vllm_config)
        rank = get_tensor_model_parallel_rank()
        index = served_index(name, settings.mask.geometry)
        self._window, self._layout = settings.window, settings.plan.layer(index, rank)
        self._offset = settings.plan.archive_offset(index, rank)
        self._selection = settings.selection_of(index)
        check_kind(name, layer)
        _check_layer(name, layer, self._layout)
        if index in settings.plan.first_layers:
            check_all_layers(self._context, settings.mask.geometry, settings.plan.states)
        heads = settings.plan.rank_heads(rank)
        channels = layer_channels(*settings.mask.layer(index, heads))
        self._take_pages(layer, channels, settings.plan.layer(0, rank))
        device = layer.leank_channels.device
        if self._archive is not None:
            self._archive.is_taken = True
            if device.type == "cuda":
                like = self._layout, self._window, self.num_heads, device
                self._scratch = self._archive.scratch(*like)

    def _find_layer(self) -> tuple[str, Any]:
        """The attention layer that this is the implementation of, and its name."""
        return next(
            (name, layer)
            for name, layer in self._context.items()
            if getattr(layer, "impl", 0) is self
        )

    def _take_pages(self, layer: Any, channels: LayerChannels, like: CacheLayout) -> None:
        """Have the layer ask vLLM for window pages, and give it what the mask says of its heads'
        channels. `like` is the layout that kernels are compiled with: of a layer that stands for
        all.
        """
        channels = channels.to(self._vllm_config.device_config.device)
        if not self._asks_for_pages:  # as it does where weights are loaded again
            layer.attn_backend = window_backend(layer.attn_backend, self._vllm_config)
            self._asks_for_pages = True
        # Buffers, so that they move, sleep and wake with the layer.
        layer.register_buffer("leank_channels", channels.order, persistent=False)
        layer.register_buffer("leank_statistics", channels.numbers, persistent=False)
        if channels.order.is_cuda:
            self._compile_kernels(like, channels.order.device)

    def _compile_kernels(self, layout: CacheLayout, device: torch.device) -> None:
        """Compile now what the layer would else compile while a request waits."""
        # Imported here: on CPU there is nothing that Triton could compile for.
        from vllm_leank.kernels.warmup import Attention, compile_kernels

        attention = Attention(
            layout,
            self._window,
            self.num_heads,
            self._vllm_config.model_config.dtype,
            most_decode_rows(self._vllm_config),
            self._vllm_config.model_config.max_model_len,
            None if self._sink_scores is None else self._sink_scores.dtype,
            load_settings(self._vllm_config).selection if layout.variants else None,
        )
        compile_kernels(attention, device, logger.info)

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
            kv_cache: window pages, `[num_blocks, num_kv_heads, window_block, 2 * head_dim]`.
            attn_metadata: the step; None while vLLM profiles memory.
            output: like `query`.
            output_scale: not supported.
            output_block_scale: not supported.

        Raises:
            OptionError: the model's code brings no K and V.
        """
        if key is None or value is None:
            raise OptionError(
                "leank: this model has layers read K and V that others stored; serve it without "
                "--attention-backend leank"
            )
        assert output_scale is None, "vLLM fuses output quantization without asking"
        if attn_metadata is None:
            return output.zero_()
        batch = attn_metadata.batch(self._archive_metadata)
        attend_layer(query, key, value, output, self._layer_cache(layer), batch, self.scale)
        return output

    def _archive_metadata(self, window: PagesMetadata) -> PagesMetadata:
        """The archive group's side of the step."""
        assert self._archive is not None
        metadata: PagesMetadata = get_forward_context().attn_metadata[self._archive.name]
        return metadata

    def _layer_cache(self, layer: Any) -> LayerCache:
        """The layer's pages as kernels take them. Kept with the window pages, to go with them: vLLM
        first allocates a small pool to try CUDA graphs with, drops it, and counts on its memory.
        """
        pages = layer.kv_cache
        found: LayerCache | None = pages.__dict__.get(_CACHE)
        if found is None:
            channels = LayerChannels(
                self._layout.profiles, layer.leank_channels, layer.leank_statistics
            )
            found = pages.__dict__[_CACHE] = LayerCache(
                window_pages=pages.detach(),  # or the pages would keep themselves
                archive_pages=self._archive_pages(pages.dtype),
                layout=self._layout,
                heads=channels.heads,
                window=self._window,
                sink_scores=self._sink_scores,
                scratch=self._scratch if any(self._layout.heads) else None,
                selection=self._selection,
            )
        return found

    def _archive_pages(self, dtype: torch.dtype) -> torch.Tensor:
        """The layer's part of the archive pages, for a model of this dtype."""
        assert self._archive is not None
        codec = codec_of(self._layout.archive_format)
        return self._archive.part(self._offset, self._layout, codec.dtype(dtype))


def check_all_layers(
    context: dict[str, Any], geometry: Geometry, states: StateLayers | None = None
) -> None:
    """Refuse a model whose code does not take its layers for what its config says.

    Args:
        context: vLLM's forward context, the model's layers by name.
        geometry: says which layers are served; all others slide, or keep states.
        states: says how many layers keep states.

    Raises:
        OptionError: names the first such layer.
    """
    found, expected = sum(map(is_state, context.values())), 0 if states is None else states.count
    if found != expected:
        raise OptionError(
            f"leank: {found} layers keep states, but the model's config says {expected}; serve "
            "this model without --attention-backend leank"
        )
    for name, layer in context.items():
        if not isinstance(layer, AttentionLayerBase) or isinstance(layer, Archive):
            continue
        if is_state(layer):
            continue
        if isinstance(getattr(layer, "impl", None), LeanKImpl):
            continue
        if layer_index(name) in geometry.layers or not getattr(layer, "sliding_window", None):
            raise OptionError(
                f"leank serves all layers with full attention or none, but {name} has a backend of "
                "its own; serve this model without --attention-backend leank"
            )


def check_kind(name: str, layer: Any) -> None:
    """Refuse a layer that is no plain causal attention: vLLM's other kinds, such as one that reads
    prompts both ways, are subclasses.
    """
    if type(layer) is not Attention:
        raise OptionError(
            f"leank does not support {type(layer).__name__}, which {name} is; serve this model "
            "without --attention-backend leank"
        )


def served_index(name: str, geometry: Geometry) -> int:
    """The number that the mask has for a layer.

    Raises:
        OptionError: by the model's config the layer has no full attention.
    """
    layer = layer_index(name)
    if layer not in geometry.layers:
        raise OptionError(
            f"leank: {name} has full attention, but the layer_types of the model's config say that "
            "it has not; serve this model without --attention-backend leank"
        )
    return geometry.layers.index(layer)


def _check_layer(name: str, layer: Any, layout: CacheLayout) -> None:
    """Refuse a layer that is not what the model's config, and so the mask, says."""
    expected = (len(layout.profiles), layout.head_dim, layout.head_dim)
    found = (layer.num_kv_heads, layer.head_size, layer.head_size_v)
    if found != expected:
        raise OptionError(
            f"leank: {name} has KV heads, K and V head sizes {found}, but the mask is for "
            f"{expected}; serve this model without --attention-backend leank"
        )
