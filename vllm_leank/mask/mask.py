"""A mask: how many bits far tokens keep of each channel, per layer and KV head."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.profile import Profiles
from vllm_leank.mask.bits import (
    BitsArray,
    bits_of_keep,
    check_bits,
    has_codes,
    head_profiles,
    profiles_of,
)
from vllm_leank.mask.checks import (
    check_align,
    check_counts,
    check_geometry,
    check_keep,
    check_model_id,
    check_plain,
    check_provenance,
    check_window,
)
from vllm_leank.mask.dump import dump_document
from vllm_leank.mask.errors import MaskError
from vllm_leank.mask.head_records import records_of
from vllm_leank.mask.hex_digits import hex_of_keep
from vllm_leank.mask.statistics import STATISTICS, HalfArray, Statistics

BoolArray = npt.NDArray[np.bool_]

KEEP_FORMAT = "leank-mask/1"
BITS_FORMAT = "leank-mask/2"
BITS_ALIGN = 16


@dataclass(frozen=True, eq=False)
class Mask:
    """A checked mask.

    `k_bits` and `v_bits` are uint8 of `geometry.shape`, `[layers, KV heads, channels]`, read-only,
    of the classes in `bits.py`. Layers are those of `geometry.layers`, numbered from 0.
    `statistics` are required where any channel has 2, 4 or 8 bits. `sink` and `recent` are the
    dense tokens the mask was made for. `provenance` names at least the `method`. `sha256` is of the
    file's bytes; of a mask made in memory, of the file that it would be.

    A mask of 16 and 0 bits without statistics is one of LeanK's, and is written as `leank-mask/1`:
    the number of channels a head keeps is a multiple of `align`. Of all others `align` is 16.

    Raises:
        MaskError: the parts do not fit each other or the format.
    """

    model: str
    geometry: Geometry
    align: int
    sink: int
    recent: int
    provenance: dict[str, Any]
    k_bits: BitsArray
    v_bits: BitsArray
    statistics: Statistics | None = None
    evaluation: dict[str, Any] | None = None
    path: Path | None = None
    sha256: str = ""

    def __post_init__(self) -> None:
        for name in ("k_bits", "v_bits"):
            bits = np.array(getattr(self, name))
            bits.setflags(write=False)
            object.__setattr__(self, name, bits)
        check_model_id(self.model)
        check_geometry(self.geometry)
        check_align(self.align, self.geometry.head_dim)
        check_window(self.sink, self.recent)
        check_provenance(self.provenance)
        if self.evaluation is not None:
            check_plain(self.evaluation, ("evaluation",))
        self._check_channels()
        if not self.sha256:
            digest = hashlib.sha256(dump_document(self.document()).encode()).hexdigest()
            object.__setattr__(self, "sha256", digest)

    def _check_channels(self) -> None:
        shape = self.geometry.shape
        if self.format == KEEP_FORMAT:
            check_counts(self.kept_counts, self.align)
        elif self.align != BITS_ALIGN:
            raise MaskError(
                f"is {self.align}; it must be {BITS_ALIGN} in {BITS_FORMAT}", loc=("align",)
            )
        check_bits(self.k_bits, self.v_bits, shape)
        if self.statistics is not None and self.statistics.shape != shape:
            raise MaskError(f"statistics must have shape {shape}, not {self.statistics.shape}")
        if self.is_packed and self.statistics is None:
            raise MaskError(
                "channels of 2, 4 or 8 bits need statistics: k_mean, k_scale, v_mean, v_scale",
                loc=("layers",),
            )

    @classmethod
    def full(
        cls,
        geometry: Geometry,
        *,
        model: str = "full",
        align: int = 32,
        sink: int = 64,
        recent: int = 256,
    ) -> "Mask":
        """The mask that keeps every channel."""
        return cls.from_keep(
            np.ones(geometry.shape, bool),
            geometry,
            model=model,
            provenance={"method": "full"},
            align=align,
            sink=sink,
            recent=recent,
        )

    @classmethod
    def from_keep(
        cls,
        keep: BoolArray,
        geometry: Geometry,
        *,
        model: str,
        provenance: dict[str, Any],
        align: int = 32,
        sink: int = 64,
        recent: int = 256,
        evaluation: dict[str, Any] | None = None,
        path: Path | None = None,
        sha256: str = "",
    ) -> "Mask":
        """A mask from `keep`, bool `[num_layers, num_kv_heads, head_dim]`.

        Kept K channels have 16 bits, and so has V of heads that keep any.
        """
        check_keep(keep, geometry.shape)
        return cls(
            model,
            geometry,
            align,
            sink,
            recent,
            provenance,
            *bits_of_keep(keep),
            evaluation=evaluation,
            path=path,
            sha256=sha256,
        )

    def with_means(self, statistics: Statistics) -> "Mask":
        """The mask with statistics, so that channels of 0 bits are read as their means."""
        return replace(self, align=BITS_ALIGN, statistics=statistics, path=None, sha256="")

    @classmethod
    def from_bits(
        cls,
        k_bits: BitsArray,
        v_bits: BitsArray,
        geometry: Geometry,
        *,
        model: str,
        provenance: dict[str, Any],
        statistics: Statistics | None = None,
        sink: int = 64,
        recent: int = 256,
        evaluation: dict[str, Any] | None = None,
        path: Path | None = None,
        sha256: str = "",
    ) -> "Mask":
        """A mask from bits of K and V, uint8 `[num_layers, num_kv_heads, head_dim]`."""
        return cls(
            model,
            geometry,
            BITS_ALIGN,
            sink,
            recent,
            provenance,
            k_bits,
            v_bits,
            statistics,
            evaluation,
            path,
            sha256,
        )

    def document(self) -> dict[str, Any]:
        """The mask as plain values, as they stand in its file."""
        bits = self.format == BITS_FORMAT
        document = {
            "format": self.format,
            "model": self.model,
            "geometry": self.geometry.as_dict(),
            **({} if bits else {"align": self.align}),
            "window": {"sink": self.sink, "recent": self.recent},
            "provenance": self.provenance,
        }
        if self.evaluation is not None:
            document["evaluation"] = self.evaluation
        if not bits:
            return document | {"layers": hex_of_keep(self.keep)}
        return document | {
            "profiles": profiles_of(self.k_bits, self.v_bits),
            "layers": records_of(self.k_bits, self.v_bits, self.statistics),
        }

    @property
    def format(self) -> str:
        """The format of the mask's file."""
        return KEEP_FORMAT if self.statistics is None and not self.is_packed else BITS_FORMAT

    @property
    def is_packed(self) -> bool:
        """Whether any channel has other bits than 0 and 16."""
        return has_codes(self.k_bits, self.v_bits)

    @property
    def bits(self) -> float:
        """Mean bits per element over K and V."""
        return float(self.k_bits.mean() + self.v_bits.mean()) / 2

    @functools.cached_property
    def keep(self) -> BoolArray:
        """K channels of which far tokens keep anything, bool like `k_bits`, read-only."""
        keep: BoolArray = self.k_bits > 0
        keep.setflags(write=False)
        return keep

    @functools.cached_property
    def profiles(self) -> Profiles:
        """Class widths of every head, `[num_layers][num_kv_heads]`."""
        return head_profiles(self.k_bits, self.v_bits)

    @property
    def kept_counts(self) -> npt.NDArray[np.int64]:
        """Kept K channels of each head, int64 `[num_layers, num_kv_heads]`."""
        return self.keep.sum(axis=-1, dtype=np.int64)

    def kept_channels(self, layer: int, head: int) -> tuple[int, ...]:
        """Indices of the K channels that KV head `head` of `layer` keeps, ascending."""
        return tuple(int(channel) for channel in np.flatnonzero(self.keep[layer, head]))

    def layer(
        self, index: int, heads: Sequence[int]
    ) -> tuple[BitsArray, BitsArray, dict[str, HalfArray] | None]:
        """Bits of K and of V, `[heads, head_dim]`, of some KV heads of a layer, and their means and
        scales by the names that they have in files.
        """
        rows = index, list(heads)
        statistics = None
        if self.statistics is not None:
            statistics = {name: getattr(self.statistics, name)[rows] for name in STATISTICS}
        return self.k_bits[rows], self.v_bits[rows], statistics

    @property
    def k_kept(self) -> float:
        """Share of the K channels that are kept."""
        return float(self.keep.mean())

    @property
    def v_kept(self) -> float:
        """Share of the V channels that are kept; in `leank-mask/1` of the heads that keep V."""
        return float((self.v_bits > 0).mean())

    @property
    def far_bytes_share(self) -> float:
        """Bytes of a far token against dense, scales left out: K and V weigh the same there."""
        return self.bits / 16
