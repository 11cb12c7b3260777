"""Far tokens of a prompt as queries read them where segments are selected, and what these are
selected by.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from vllm_leank.kernels.channels import layer_channels
from vllm_leank.kernels.codecs import codec_of

from vllm_leank.core.window import GRANULE
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.settings import choose_format
from vllm_leank.offline.context import Context


@dataclass(frozen=True)
class FarLayer:
    """A layer's far tokens, whole granules of them from the sink's end on.

    Attributes:
        key: fp32 `[H, tokens, D]`, as it is read.
        value: like `key`.
        blind: bool `[H]`, heads that store nothing and so do not see far tokens.
        lead: fp32 `[H, tokens, D]`, what of K queries select by: other channels are 0.
    """

    key: torch.Tensor
    value: torch.Tensor
    blind: torch.Tensor
    lead: torch.Tensor


Store = Callable[[int, torch.Tensor, torch.Tensor], FarLayer]
"""Takes a layer, K after RoPE and V `[H, tokens, D]` of far tokens; gives what is read of them."""


def unrounded(layer: int, key: torch.Tensor, value: torch.Tensor) -> FarLayer:
    """Far tokens as they are. No engine selects these: they are selected by all of K."""
    key = key.float()
    return FarLayer(key, value.float(), key.new_zeros(len(key), dtype=torch.bool), key)


class Coded:
    """Far tokens of a mask, as an engine with the option `pages` stores and selects them.

    Raises:
        UserError: the mask has heads with V alone: there is nothing to choose by.
    """

    def __init__(self, mask: Mask):
        self._mask = mask
        self._format = choose_format(mask, selects=True)

    def __call__(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> FarLayer:
        """See `Store`."""
        codec = codec_of(self._format)
        every_head = range(self._mask.geometry.num_kv_heads)
        heads = layer_channels(*self._mask.layer(layer, every_head)).to(key.device).heads
        far_key, far_value = (part.to(torch.float32, copy=True) for part in (key, value))
        lead = torch.zeros_like(far_key)
        for index, head in enumerate(heads):
            if head.profile.stores:
                far_key[index], far_value[index] = codec.round(key[index], value[index], head)
                channels = head.k.order[: self._format.lead(head.profile)]
                lead[index][:, channels] = far_key[index][:, channels]
        blind = torch.tensor([not head.profile.stores for head in heads], device=key.device)
        return FarLayer(far_key, far_value, blind, lead)


@dataclass(frozen=True)
class FarTokens:
    """A prompt's far tokens in all layers, each made when it is first read: all whole granules
    behind the sink.
    """

    context: Context
    sink: int
    store: Store
    _layers: dict[int, FarLayer] = field(default_factory=dict)

    def __call__(self, layer: int) -> FarLayer:
        """Those of a layer."""
        if layer not in self._layers:
            granules = (self.context.length - self.sink) // GRANULE
            far = slice(self.sink, self.sink + granules * GRANULE)
            key, value = self.context.key(layer)[0, :, far], self.context.value(layer)[0, :, far]
            self._layers[layer] = self.store(layer, key, value)
        return self._layers[layer]
