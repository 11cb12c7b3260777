"""What archives give back and the bytes of a packed one, from the definitions alone."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vllm_leank.core.formats import NATIVE, ArchiveFormat
from vllm_leank.core.formats.packed import FORMAT as PACKED
from vllm_leank.core.page_sizes import plan_cache
from vllm_leank.core.plan import CachePlan
from vllm_leank.core.profile import Profile, Profiles, whole_heads
from vllm_leank.mask.mask import Mask

STEP = {8: 1 / 24, 4: 0.335, 2: 0.996}

CODED = {
    64: (Profile(k2=64, v4=32), Profile(k8=16, k4=32, v2=64), Profile(), Profile(k8=64, v8=64)),
    128: (
        Profile(k8=16, k4=32, k2=64, v4=64, v2=64),
        Profile(k2=128, v2=128),
        Profile(),
        Profile(k4=128, v8=32),
    ),
    256: (
        Profile(k2=256, v2=256),
        Profile(k8=32, k4=64, k2=128, v8=128, v4=128),
        Profile(k4=256, v4=128, v2=64),
    ),
}
"""Heads of a packed archive, by their channels."""

EIGHT = (
    Profile(k8=16, k4=32, k2=64, v2=128),
    Profile(k8=16, k4=32, k2=64, v8=32, v4=32, v2=64),
    Profile(k8=16, k4=32, v2=128),
    Profile(k8=16, k2=64, v2=128),
    Profile(k4=32, k2=64, v2=128),
    Profile(k4=32),
    Profile(k4=32, v2=64),
    Profile(k8=32, k4=32, k2=64, v4=64, v2=64),
)
"""Heads of 128 channels, with as many profiles as a mask may have, which are compiled apart. Triton
3.6 has failed at a kernel that compiled for each of them alone.
"""


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
    """Classes as wide as a row may be; what they leave of `count`, as of 240, has 0 bits."""
    if not count:
        return Profile()
    k2 = _largest(count, 64)
    k4 = _largest(count - k2, 32)
    v2 = _largest(head_dim // 2, 64)
    v4 = _largest(head_dim - v2, 32)
    return Profile(
        k8=_largest(count - k2 - k4, 16), k4=k4, k2=k2,
        v8=_largest(head_dim - v2 - v4, 16), v4=v4, v2=v2,
    )  # fmt: skip


def _largest(count: int, unit: int) -> int:
    """A power of two of units, at most `count`; 0 if there is no room for one."""
    return unit << (count // unit).bit_length() - 1 if count >= unit else 0


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


def numbers_of(mask: Mask, kind: str, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bits, means and scales of the channels of a head's K or V ("k" or "v")."""
    bits = getattr(mask, f"{kind}_bits")[layer, head].copy()
    found = (getattr(mask.statistics, f"{kind}_{name}") for name in ("mean", "scale"))
    mean, scale = (part[layer, head].astype(np.float32) for part in found)
    return torch.from_numpy(bits), torch.from_numpy(mean), torch.from_numpy(scale)


def archive_of(mask: Mask) -> Callable[[int, int, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What a packed archive gives back of K and V `[tokens, head_dim]` of a layer's KV head."""

    def read_back(layer: int, head: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (numbers_of(mask, kind, layer, head) for kind in "kv")
        of_token = token_scale(value, *values)
        return (
            read_codes(codes_of(key, *keys), *keys),
            read_codes(codes_of(value, *values, of_token), *values, of_token),
        )

    return read_back
