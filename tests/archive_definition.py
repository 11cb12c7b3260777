"""What archives give back and the bytes of a packed one, from the definitions alone."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vllm_leank.core.formats import NATIVE, ArchiveFormat, find_format
from vllm_leank.core.plan import CachePlan, plan_cache
from vllm_leank.core.profile import Profile, Profiles, whole_heads
from vllm_leank.mask.mask import Mask

FP8, PACKED = find_format("fp8"), find_format("packed")

STEP = {8: 1 / 24, 4: 0.335, 2: 0.996}


def profiles_for(archive_format: ArchiveFormat, kept: list, head_dim: int) -> Profiles:
    """Heads that keep so many channels (multiples of 16) of K, in all ways that the format has."""
    if archive_format != PACKED:
        return whole_heads(kept, head_dim)
    return tuple(tuple(_packed_head(count, head_dim) for count in layer) for layer in kept)


def plan_of(
    kept: list,
    head_dim: int,
    itemsize: int,
    tp_size: int = 1,
    archive_format: ArchiveFormat = NATIVE,
    **options: object,
) -> CachePlan:
    """`plan_cache` of `profiles_for`."""
    profiles = profiles_for(archive_format, kept, head_dim)
    return plan_cache(profiles, head_dim, itemsize, tp_size, archive_format, **options)


def _packed_head(count: int, head_dim: int) -> Profile:
    if not count:
        return Profile()
    v8 = count % 64 if head_dim > 64 else 0
    v4 = (head_dim - v8) // 64 * 32
    v2 = (head_dim - v8 - v4) // 64 * 64
    return Profile(
        k8=count % 32, k4=count % 64 - count % 32, k2=count - count % 64, v8=v8, v4=v4, v2=v2
    )


def token_scale(values: Tensor, bits: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """V's scale of each token, fp16 `[tokens, 1]`: root mean square over the channels with bits."""
    with_bits = bits > 0
    if not with_bits.any():
        return values.new_full((len(values), 1), 2**-14, dtype=torch.float16)
    normal = ((values.float() - mean) / scale)[:, with_bits]
    return normal.square().mean(1, keepdim=True).sqrt().clamp(2**-14, 65504).half()


def codes_of(
    values: Tensor, bits: Tensor, mean: Tensor, scale: Tensor, of_token: Tensor | None = None
) -> Tensor:
    """The code of each of `[tokens, channels]`, int64, with the channels' scales and, where given,
    the tokens'. Reciprocals are rounded to fp32 before they are multiplied.
    """
    inverse = 1 if of_token is None else 1 / of_token.float()
    codes = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    for kind, step in STEP.items():
        code = ((values.float() - mean) * (1 / (step * scale)) * inverse).floor() + 2 ** (kind - 1)
        codes = torch.where(bits == kind, code.clamp(0, 2**kind - 1).long(), codes)
    return codes


def read_codes(
    codes: Tensor, bits: Tensor, mean: Tensor, scale: Tensor, of_token: Tensor | None = None
) -> Tensor:
    """What codes stand for, fp64; channels of 0 bits are their means."""
    values = mean.double().expand(codes.shape).clone()
    scale = scale.double() if of_token is None else scale.double() * of_token.double()
    for kind, step in STEP.items():
        value = mean + (codes - (2**kind - 1) / 2) * (step * scale)
        values = torch.where(bits == kind, value, values)
    return values


def field_bytes(codes: Tensor, bits: Tensor, kind: int) -> Tensor:
    """The field of a class: bytes `[tokens, width]` of the codes of `kind` bits, whose channels
    ascend; part i of a byte is i times the field's width away.
    """
    of_class = codes[:, bits == kind]
    width = of_class.shape[1] * kind // 8
    field = torch.zeros(len(codes), width, dtype=torch.int64, device=codes.device)
    for channel in range(of_class.shape[1]):
        field[:, channel % width] += of_class[:, channel] * 2 ** (kind * (channel // width))
    return field.to(torch.uint8)


def archive_of(mask: Mask) -> Callable[[int, int, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What a packed archive gives back of K and V `[tokens, head_dim]` of a layer's KV head."""

    def read_back(layer: int, head: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        def numbers(kind: str) -> tuple[Tensor, Tensor, Tensor]:
            bits = getattr(mask, f"{kind}_bits")[layer, head].copy()
            found = (getattr(mask.statistics, f"{kind}_{name}") for name in ("mean", "scale"))
            mean, scale = (part[layer, head].astype(np.float32) for part in found)
            return tuple(torch.from_numpy(part).to(key.device) for part in (bits, mean, scale))

        of_token = token_scale(value, *numbers("v"))
        return (
            read_codes(codes_of(key, *numbers("k")), *numbers("k")),
            read_codes(codes_of(value, *numbers("v"), of_token), *numbers("v"), of_token),
        )

    return read_back
