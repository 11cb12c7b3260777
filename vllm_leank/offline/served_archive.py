"""What an engine's archive gives back of far K and V: every number as the archive's format rounds
it, channels that are not stored as their means.
"""

from functools import cache

import torch

from vllm_leank.kernels.channels import LayerChannels, layer_channels
from vllm_leank.kernels.codecs import codec_of
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.settings import choose_format


class ServedArchive:
    """An `Archive` for `SimulatedArchive`: a mask's, in the format that engines take for it.

    Attributes:
        archive_format: what the mask decides.
        blind: bool `[L, H]`, heads that store nothing and so do not see far tokens.
        channels: what is known of the channels of a layer, by its number, on a device.

    Raises:
        UserError: no format can store what the mask keeps.
    """

    def __init__(self, mask: Mask):
        self.archive_format = choose_format(mask)
        self.blind = torch.tensor(~(mask.k_bits.any(-1) | mask.v_bits.any(-1)))
        self._mask = mask
        self.channels = cache(self._load_channels)

    def __call__(
        self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V `[B, H, T, D]` of the tokens from `first`, the sink's end, on, in fp32."""
        far_key, far_value = (part.to(torch.float32, copy=True) for part in (key, value))
        codec = codec_of(self.archive_format)
        for index, head in enumerate(self.channels(layer, key.device).heads):
            if not head.profile.stores:
                continue
            rounded = [
                codec.round(*pair, head)
                for pair in zip(key[:, index], value[:, index], strict=True)
            ]
            keys, values = zip(*rounded, strict=True)
            far_key[:, index], far_value[:, index] = torch.stack(keys), torch.stack(values)
        return far_key, far_value

    def _load_channels(self, layer: int, device: torch.device) -> LayerChannels:
        heads = range(self._mask.geometry.num_kv_heads)
        return layer_channels(*self._mask.layer(layer, heads)).to(device)
