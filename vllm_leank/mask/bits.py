"""How many bits far tokens keep of each channel, and which numbers of channels go together.

Bits are uint8 `[L, H, D]`, one array for K and one for V. A channel has one of five classes: 16 is
the model's dtype, 8, 4 and 2 are codes of so many bits, and with 0 nothing is stored.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from vllm_leank.core.formats.packed import CODE_CLASSES, class_counts
from vllm_leank.core.profile import Profile, Profiles
from vllm_leank.errors import UserError
from vllm_leank.mask.errors import MaskError

BitsArray = npt.NDArray[np.uint8]
ProfileEntry = dict[str, dict[str, int]]

CLASSES = (16, 8, 4, 2, 0)

MAX_PROFILES = 8
"""Kernels are compiled for the class widths that heads have, so these must be few."""

LEAST_BITS, MOST_BITS = 0.75, 8.0
"""Bits per element that a mask may be asked for."""


def check_bits_asked(bits: float) -> None:
    """Refuse bits per element that no mask can have.

    Raises:
        UserError: says what is allowed.
    """
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise UserError(
            f"bits is {bits:g}; it must lie between {LEAST_BITS:g} and {MOST_BITS:g}: 8 halve a "
            "16-bit cache, and 2 make it about 7 times smaller"
        )


def bits_of_keep(keep: npt.NDArray[np.bool_]) -> tuple[BitsArray, BitsArray]:
    """Bits of K and V where channels are kept whole or not at all; V goes with its head's K."""
    k_bits = np.where(keep, 16, 0).astype(np.uint8)
    v_bits = np.broadcast_to(k_bits.max(axis=-1, keepdims=True), keep.shape).copy()
    return k_bits, v_bits


def has_codes(k_bits: BitsArray, v_bits: BitsArray) -> bool:
    """Whether any channel is stored in 2, 4 or 8 bits."""
    return any(bool((bits % 16).any()) for bits in (k_bits, v_bits))


def profiles_of(k_bits: BitsArray, v_bits: BitsArray) -> list[ProfileEntry]:
    """The different class widths of heads, as `{"k": {"8": 32, "4": 96}, "v": {"4": 128}}`.

    Those with most channels of many bits come first. Classes that a head has no channel of are
    left out.
    """
    counts = np.stack([_counts(k_bits), _counts(v_bits)], axis=-2).reshape(-1, 2 * len(CLASSES))
    rows = np.unique(counts, axis=0)[::-1].reshape(-1, 2, len(CLASSES))
    return [
        {
            name: {str(kind): int(count) for kind, count in zip(CLASSES, row, strict=True) if count}
            for name, row in zip("kv", rows_of_head, strict=True)
        }
        for rows_of_head in rows
    ]


def head_profiles(k_bits: BitsArray, v_bits: BitsArray) -> Profiles:
    """Class widths of every head, `[num_layers][num_kv_heads]`."""
    counts = np.concatenate([_counts(bits)[..., :-1] for bits in (k_bits, v_bits)], axis=-1)
    return tuple(tuple(Profile(*head) for head in layer) for layer in counts.tolist())


def check_bits(k_bits: BitsArray, v_bits: BitsArray, shape: tuple[int, int, int]) -> None:
    """Refuse bits that no page could hold.

    Raises:
        MaskError: the first fault, with the layer and head where it is.
    """
    for name, bits in (("k", k_bits), ("v", v_bits)):
        if bits.dtype != np.uint8 or bits.shape != shape:
            raise MaskError(
                f"{name}_bits must be uint8 of shape {shape}, not {bits.dtype} {bits.shape}"
            )
        for i, j in _places(np.any(~np.isin(bits, CLASSES), axis=-1)):
            raise MaskError("has other bits than 0, 2, 4, 8 and 16", loc=("layers", i, j, name))
    _check_whole_heads(k_bits, v_bits)
    for name, bits in (("k", k_bits), ("v", v_bits)):
        counts = (bits == 16).sum(axis=-1)
        for i, j in _places(counts % 16 > 0):
            raise MaskError(
                f"has {counts[i, j]} channels of 16 bits, no multiple of 16",
                loc=("layers", i, j, name),
            )
        for kind in CODE_CLASSES:
            counts, allowed = (bits == kind).sum(axis=-1), class_counts(kind)
            for i, j in _places(~np.isin(counts, allowed)):
                raise MaskError(
                    f"has {counts[i, j]} channels of {kind} bits, which no packed archive can "
                    f"hold; allowed: {', '.join(map(str, allowed))}",
                    loc=("layers", i, j, name),
                )
    if has_codes(k_bits, v_bits) and (count := len(profiles_of(k_bits, v_bits))) > MAX_PROFILES:
        raise MaskError(
            f"heads have {count} different class widths; at most {MAX_PROFILES} are allowed",
            loc=("profiles",),
        )


def check_profiles(
    given: Sequence[Mapping[str, Mapping[str, int]]], k_bits: BitsArray, v_bits: BitsArray
) -> None:
    """Refuse a list of profiles that is not that of the heads; its order is free.

    Raises:
        MaskError: a profile is missing, given twice, or no head has it.
    """
    wanted = profiles_of(k_bits, v_bits)
    seen: list[ProfileEntry] = []
    for index, profile in enumerate(given):
        found = {name: {kind: n for kind, n in profile[name].items() if n} for name in "kv"}
        if found not in wanted:
            raise MaskError("no head has these class widths", loc=("profiles", index))
        if found in seen:
            raise MaskError(f"is the same as profile {seen.index(found)}", loc=("profiles", index))
        seen.append(found)
    for profile in wanted:
        if profile not in seen:
            raise MaskError(f"lacks {profile}, which heads have", loc=("profiles",))


def _check_whole_heads(k_bits: BitsArray, v_bits: BitsArray) -> None:
    """A head stores codes, or K channels of 16 bits with its whole V."""
    codes = ((k_bits % 16) | (v_bits % 16)).any(axis=-1)
    k_whole, v_whole = (k_bits == 16).any(axis=-1), (v_bits == 16).any(axis=-1)
    for i, j in _places(codes & (k_whole | v_whole)):
        raise MaskError("has channels of 16 bits beside fewer bits", loc=("layers", i, j))
    whole = (v_bits == 16).all(axis=-1)
    for i, j in _places((k_whole != v_whole) | (v_whole != whole)):
        raise MaskError(
            "must keep all V of a head with K channels of 16 bits, and none without",
            loc=("layers", i, j, "v"),
        )


def _counts(bits: BitsArray) -> npt.NDArray[np.int64]:
    """Channels of each class, `[L, H, classes]`."""
    return np.stack([(bits == kind).sum(axis=-1, dtype=np.int64) for kind in CLASSES], axis=-1)


def _places(faults: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    for i, j in np.argwhere(faults):
        yield int(i), int(j)
