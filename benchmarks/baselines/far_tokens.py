"""Far tokens of a prompt as queries read them where segments are selected, and what granules are
scored by.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from vllm_leank.kernels.channels import HeadChannels, layer_channels
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
        score: takes queries `[H, n, group, D]`, scaled, and gives what each granule's summary says
            of it for the group, fp32 `[H, n, granules]`.
    """

    key: torch.Tensor
    value: torch.Tensor
    blind: torch.Tensor
    score: Callable[[torch.Tensor], torch.Tensor]


Store = Callable[[int, torch.Tensor, torch.Tensor], FarLayer]
"""Takes a layer, K after RoPE and V `[H, tokens, D]` of far tokens; gives what is read of them."""


def unrounded(layer: int, key: torch.Tensor, value: torch.Tensor) -> FarLayer:
    """Far tokens as they are. No engine selects these: summaries are means and variances of K
    itself, of all channels, as they would be with codes and summaries that round nothing.
    """
    key, value = key.float(), value.float()
    granules = key.unflatten(1, (-1, GRANULE))
    means, variances = granules.mean(2), granules.var(2, correction=0)

    def score(queries: torch.Tensor) -> torch.Tensor:
        return queries.sum(2) @ means.mT + queries.square().sum(2) @ (variances / 2).mT

    return FarLayer(key, value, key.new_zeros(len(key), dtype=torch.bool), score)


class Coded:
    """Far tokens of a mask of bits, as an engine with the option `pages` stores and scores them.

    Raises:
        UserError: the mask has no bits, or heads without summaries.
    """

    def __init__(self, mask: Mask):
        self._mask = mask
        self._format = choose_format(mask, summaries=True)

    def __call__(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> FarLayer:
        """See `Store`."""
        codec = codec_of(self._format)
        every_head = range(self._mask.geometry.num_kv_heads)
        heads = layer_channels(*self._mask.layer(layer, every_head)).to(key.device).heads
        far_key, far_value = (part.to(torch.float32, copy=True) for part in (key, value))
        summaries: dict[int, torch.Tensor] = {}
        for index, head in enumerate(heads):
            if head.profile.stores:
                own = key[index], value[index]
                far_key[index], far_value[index] = codec.round(*own, head)
                granules = (part.unflatten(0, (-1, GRANULE)) for part in own)
                count = self._format.summary_bytes(head.profile)
                summaries[index] = codec.summarise(codec.encode(*granules, head), head, count)
        blind = torch.tensor([not head.profile.stores for head in heads], device=key.device)
        return FarLayer(far_key, far_value, blind, self._scores(heads, summaries, key.shape[1]))

    def _scores(
        self, heads: tuple[HeadChannels, ...], summaries: dict[int, torch.Tensor], tokens: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        codec = codec_of(self._format)

        def score(queries: torch.Tensor) -> torch.Tensor:
            nothing = queries.new_zeros(queries.shape[1], tokens // GRANULE)
            scores = [
                codec.score(queries[index], summaries[index], head)
                if index in summaries
                else nothing
                for index, head in enumerate(heads)
            ]
            return torch.stack(scores)

        return score


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
