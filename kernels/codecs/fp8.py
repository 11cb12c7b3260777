"""The archive in 8-bit floats (e4m3), with a scale for each head and granule.

Divided by its scale, a granule's largest number is 448, e4m3's own. Scales fixed once for all would
need calibration, and finer ones should gain little, since e4m3 has an exponent of its own.
"""

from functools import cached_property

import torch
import triton
import triton.language as tl
from vllm_leank.kernels.channels import HeadChannels
from vllm_leank.kernels.codecs.codec import Codec, DecodeShape, Stored
from vllm_leank.kernels.codecs.tiles import Tiles

E4M3_MAX = tl.constexpr(448.0)
"""The largest number of e4m3."""


@triton.jit
def encode(x):
    """`x` in units of a scale that brings its largest value to that of e4m3, and the scale."""
    scale = tl.max(tl.max(tl.abs(x), 0), 0) * (1 / E4M3_MAX)
    scale = tl.where(scale > 0, scale, 1.0)
    return tl.clamp(tl.div_rn(x, scale), -E4M3_MAX, E4M3_MAX), scale


class Fp8Codec(Codec):
    """Numbers in e4m3; beside them the scales of K and of V, fp32 each."""

    decode_shape = DecodeShape(tile=128)

    @cached_property
    def tiles(self) -> Tiles:
        from vllm_leank.kernels import fold_columns, fold_rows, whole_store

        folds = fold_columns.fold_archive, fold_rows.fold_archive
        return Tiles(*folds, whole_store.compact, encode, E4M3_MAX.value)

    def dtype(self, model: torch.dtype) -> torch.dtype:
        return torch.float8_e4m3fn

    @property
    def empty_side(self) -> torch.Tensor:
        return torch.ones(2, dtype=torch.float32).view(torch.uint8)

    def encode(self, key: torch.Tensor, value: torch.Tensor, head: HeadChannels) -> Stored:
        (key, k_scale), (value, v_scale) = (
            self._scaled(key[..., head.k.stored]),
            self._scaled(value),
        )
        return Stored(key, value, torch.stack((k_scale, v_scale), dim=-1).view(torch.uint8))

    def decode(self, stored: Stored, head: HeadChannels) -> tuple[torch.Tensor, torch.Tensor]:
        k_scale, v_scale = stored.side.view(torch.float32)[..., None, None].unbind(-3)
        return head.k.complete(stored.key.float() * k_scale), stored.value.float() * v_scale

    def _scaled(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values `[n, 32, width]` in e4m3, and their scales `[n]`."""
        values, largest = values.float(), E4M3_MAX.value
        # Not divided by 448: a product has the same bits on every device.
        most = values.abs().amax((1, 2)) if values.shape[-1] else values.new_zeros(len(values))
        scale = most * (1 / largest)
        scale = scale.where(scale > 0, 1.0)
        stored = (values / scale[:, None, None]).clamp(-largest, largest)
        return stored.to(torch.float8_e4m3fn), scale
