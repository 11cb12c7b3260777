"""The archive in the model's own dtype."""

import torch
from vllm_leank.kernels.codecs.codec import Codec, Stored
from vllm_leank.kernels.codecs.tiles import Tiles


class NativeCodec(Codec):
    """Numbers as they are in window pages."""

    tiles = Tiles()

    def dtype(self, model: torch.dtype) -> torch.dtype:
        return model

    def encode(self, key: torch.Tensor, value: torch.Tensor) -> Stored:
        return Stored(key, value, key.new_empty((len(key), 0), dtype=torch.uint8))

    def decode(self, stored: Stored) -> tuple[torch.Tensor, torch.Tensor]:
        return stored.key.float(), stored.value.float()
