"""The archive in the model's own dtype."""

from functools import cached_property

import torch
from vllm_leank.kernels.channels import HeadChannels
from vllm_leank.kernels.codecs.codec import Codec, Stored
from vllm_leank.kernels.codecs.tiles import Tiles


class NativeCodec(Codec):
    """Numbers as they are in window pages."""

    @cached_property
    def tiles(self) -> Tiles:
        from vllm_leank.kernels import fold_columns, fold_rows, whole_lead, whole_store

        folds = fold_columns.fold_archive, fold_rows.fold_archive
        return Tiles(*folds, whole_store.compact, lead=whole_lead)

    def dtype(self, model: torch.dtype) -> torch.dtype:
        return model

    def encode(self, key: torch.Tensor, value: torch.Tensor, head: HeadChannels) -> Stored:
        side = key.new_empty((len(key), 0), dtype=torch.uint8)
        return Stored(key[..., head.k.stored], value, side)

    def decode(self, stored: Stored, head: HeadChannels) -> tuple[torch.Tensor, torch.Tensor]:
        return stored.key.float(), stored.value.float()
