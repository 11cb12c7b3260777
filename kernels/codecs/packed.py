"""The archive in codes of 8, 4 and 2 bits; see `core.formats.packed` for the fields of a page.

Code `c` of `b` bits stands for `mean + (c - (2^b - 1) / 2) * factor`, where `factor` is the step of
the class times the channel's scale: an even number of steps, with none at the mean itself. V's are
multiplied by one more scale for each token, the root mean square of what it has in its channels'
own units. Mean and scale of a channel are the mask's.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import torch
from vllm_leank.kernels.channels import Channels, HeadChannels
from vllm_leank.kernels.codecs.codec import Codec, DecodeShape, Requests, Stored
from vllm_leank.kernels.codecs.tiles import Tiles

from vllm_leank.core.formats.packed import (
    CODE_CLASSES,
    FORMAT,
    LARGEST_SCALE,
    LEAST_SCALE,
    STEPS,
)
from vllm_leank.core.pages import CacheLayout
from vllm_leank.core.profile import Profile
from vllm_leank.core.window import GRANULE

FEW_BITS = DecodeShape(
    tile=64, warps=1, stages=3, window_stages=2, window_tile=16, registers=128, wave=1024
)
"""Of few bits: short tiles, and few registers, so that many programs run."""

ONE_REQUEST = replace(FEW_BITS, window_tile=32, registers=192)
"""For one request of few bits: a multiprocessor has 8 of its programs, half of what fits, so each
may have more registers. Launches of several requests have programs that find nothing to do, as
lengths are not known before, and all of them need room at once.
"""

MANY_REQUESTS = replace(FEW_BITS, wave=2 * 16 * 132)
"""For many requests, in two waves of 16 programs for each multiprocessor."""

TWO_BITS = replace(FEW_BITS, tile=128, registers=160, wave=2 * 12 * 132)
"""For many requests, where all heads have about 2 bits: long tiles take fewer instructions per
token, and load V in longer rows. Heads of more bits would leave room for few programs."""

MANY_BITS = replace(FEW_BITS, tile=128, registers=None, window_tile=32, wave=512, window_cost=2)
"""Bytes are the limit: long tiles."""

MANY_BITS_MANY_REQUESTS = replace(MANY_BITS, stages=2, window_tile=16, wave=2 * 8 * 132)
"""With a shorter pipeline a multiprocessor has room for 8 programs instead of 6."""


class PackedCodec(Codec):
    """Codes as bytes; beside them the scales of V, fp16 `[32]` for each granule."""

    side_dtype = torch.float16
    any_codes = True
    whole_channels = False
    extend_shape = 128, 128, 8, 2

    def dtype(self, model: torch.dtype) -> torch.dtype:
        return torch.uint8

    @cached_property
    def tiles(self) -> Tiles:
        from vllm_leank.kernels import (
            packed_columns,
            packed_lead,
            packed_rows,
            packed_store,
            packed_unpack,
        )

        return Tiles(
            packed_columns.fold_archive,
            packed_rows.fold_archive,
            packed_store.compact,
            unpack=packed_unpack.unpack,
            lead=packed_lead,
        )

    def decode_shape(
        self, layout: CacheLayout, requests: Requests = Requests.FEW, short_tiles: bool = False
    ) -> DecodeShape:
        if _all_heads_have(3, 5, layout):
            return MANY_BITS_MANY_REQUESTS if requests is Requests.MANY else MANY_BITS
        if requests is Requests.ONE and layout.head_dim <= 128:
            return ONE_REQUEST
        if requests is not Requests.MANY:
            return FEW_BITS
        is_long = not short_tiles and _all_heads_have(1.5, 2.5, layout)
        return TWO_BITS if is_long else MANY_REQUESTS

    def query_places(self, profile: Profile, head_dim: int) -> torch.Tensor:
        from vllm_leank.kernels.packed_query import query_places

        return torch.tensor(query_places(FORMAT.variant(profile), head_dim))

    @property
    def empty_side(self) -> torch.Tensor:
        return torch.zeros(2 * GRANULE, dtype=torch.uint8)

    def encode(self, key: torch.Tensor, value: torch.Tensor, head: HeadChannels) -> Stored:
        keys = [_pack(_codes(steps, bits), bits) for bits, steps in _steps(key, head.k)]
        values = list(_steps(value, head.v))
        scale = _token_scale(values, value)
        inverse = 1 / scale.float()[..., None]
        values = [(bits, _pack(_codes(steps * inverse, bits), bits)) for bits, steps in values]
        return Stored(
            torch.cat(keys, dim=-1),
            torch.cat([codes for _, codes in values], dim=-1),
            scale.contiguous().view(torch.uint8),
        )

    def decode(self, stored: Stored, head: HeadChannels) -> tuple[torch.Tensor, torch.Tensor]:
        scale = stored.side.contiguous().view(torch.float16).float()[..., None]
        keys, values = _centred(stored.key, head.k), _centred(stored.value, head.v).mul_(scale)
        return (
            keys.add_(head.k.mean[: keys.shape[-1]]),
            values.add_(head.v.mean[: values.shape[-1]]),
        )


def _all_heads_have(least: float, most: float, layout: CacheLayout) -> bool:
    """Whether heads that store anything have so many bits per number, scales of V included, and so
    few channels that sums over V leave registers for long tiles.
    """
    per_bit = 2 * layout.head_dim / 8
    sizes = [layout.archive_format.token_bytes(one, layout.itemsize) for one in layout.variants]
    if layout.head_dim > 128 or not sizes:
        return False
    return least * per_bit <= min(sizes) and max(sizes) <= most * per_bit


def _steps(values: torch.Tensor, channels: Channels) -> Iterator[tuple[int, torch.Tensor]]:
    """Bits and distance from the mean in steps, fp32 `[..., count]`, of each class."""
    first = 0
    for bits, count in zip(CODE_CLASSES, channels.counts[1:], strict=True):
        part = slice(first, first + count)
        values_of_class = values[..., channels.order[part]].float()
        yield bits, (values_of_class - channels.mean[part]) * channels.inverse[part]
        first += count


def _codes(steps: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes, uint8. The floor comes before the sum: no device can then fuse product and sum."""
    return (steps.floor() + 2 ** (bits - 1)).clamp(0, 2**bits - 1).to(torch.uint8)


def _token_scale(values: list[tuple[int, torch.Tensor]], like: torch.Tensor) -> torch.Tensor:
    """Root mean square of each token in its channels' scales, fp16 `[n, 32]`."""
    total = torch.zeros(like.shape[:-1], dtype=torch.float32, device=like.device)
    for bits, steps in values:
        total = total + steps.square().sum(-1) * STEPS[bits] ** 2
    count = sum(steps.shape[-1] for _, steps in values)
    root = (total / max(count, 1)).sqrt()
    return root.clamp(LEAST_SCALE, LARGEST_SCALE).half()


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[..., count]` in bytes `[..., count * bits / 8]`."""
    fields = codes.unflatten(-1, (8 // bits, codes.shape[-1] * bits // 8))
    packed = torch.zeros_like(fields[..., 0, :])
    for i, field in enumerate(fields.unbind(-2)):
        packed |= field << (bits * i)
    return packed


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[..., count]` of bytes."""
    if bits == 8:
        return packed
    fields = [(packed >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.cat(fields, dim=-1)


def _centred(rows: torch.Tensor, channels: Channels) -> torch.Tensor:
    """What the codes of tokens stand for, less the means, fp32 `[..., stored]`."""
    parts, first = [], 0
    for bits, count in zip(CODE_CLASSES, channels.counts[1:], strict=True):
        width = count * bits // 8
        codes = _unpack(rows[..., first : first + width], bits)
        parts.append(codes.float().sub_((2**bits - 1) / 2))
        first += width
    centred = torch.cat(parts, dim=-1)
    return centred.mul_(channels.factor[: centred.shape[-1]])
