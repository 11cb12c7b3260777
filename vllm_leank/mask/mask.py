"""A mask: which K channels far tokens keep, per layer and KV head."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_leank.core.geometry import Geometry
from vllm_leank.mask.checks import (
    check_align,
    check_geometry,
    check_keep,
    check_model_id,
    check_plain,
    check_provenance,
    check_window,
)
from vllm_leank.mask.dump import dump_document
from vllm_leank.mask.hex_digits import hex_of_keep

FORMAT = "leank-mask/1"

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Mask:
    """A checked mask.

    `keep` is bool `[num_layers, num_kv_heads, head_dim]`, read-only. The number of channels a head
    keeps is a multiple of `align`. `sink` and `recent` are the dense tokens the mask was made for.
    `provenance` names at least the `method`. `sha256` is of the file's bytes; of a mask made in
    memory, of the file that it would be.

    Raises:
        MaskError: the parts do not fit each other or the format.
    """

    model: str
    geometry: Geometry
    align: int
    sink: int
    recent: int
    provenance: dict[str, Any]
    keep: BoolArray
    evaluation: dict[str, Any] | None = None
    path: Path | None = None
    sha256: str = ""

    def __post_init__(self) -> None:
        keep = np.array(self.keep)
        keep.setflags(write=False)
        object.__setattr__(self, "keep", keep)
        check_model_id(self.model)
        check_geometry(self.geometry)
        check_align(self.align, self.geometry.head_dim)
        check_window(self.sink, self.recent)
        check_provenance(self.provenance)
        if self.evaluation is not None:
            check_plain(self.evaluation, ("evaluation",))
        check_keep(keep, self.geometry, self.align)
        if not self.sha256:
            digest = hashlib.sha256(dump_document(self.document()).encode()).hexdigest()
            object.__setattr__(self, "sha256", digest)

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
        shape = (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim)
        return cls(model, geometry, align, sink, recent, {"method": "full"}, np.ones(shape, bool))

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
    ) -> "Mask":
        """A mask from `keep`, bool `[num_layers, num_kv_heads, head_dim]`."""
        return cls(model, geometry, align, sink, recent, provenance, keep, evaluation)

    def document(self) -> dict[str, Any]:
        """The mask as plain values, as they stand in its file."""
        document = {
            "format": FORMAT,
            "model": self.model,
            "geometry": self.geometry.as_dict(),
            "align": self.align,
            "window": {"sink": self.sink, "recent": self.recent},
            "provenance": self.provenance,
        }
        if self.evaluation is not None:
            document["evaluation"] = self.evaluation
        return document | {"layers": hex_of_keep(self.keep)}

    @property
    def kept_counts(self) -> npt.NDArray[np.int64]:
        """Kept channels of each head, int64 `[num_layers, num_kv_heads]`."""
        return self.keep.sum(axis=-1, dtype=np.int64)

    def kept_channels(self, layer: int, head: int) -> tuple[int, ...]:
        """Indices of the channels that KV head `head` of `layer` keeps, ascending."""
        return tuple(int(channel) for channel in np.flatnonzero(self.keep[layer, head]))

    @property
    def k_kept(self) -> float:
        """Share of the K channels that are kept."""
        return float(self.keep.mean())

    @property
    def v_kept(self) -> float:
        """Share of the heads that keep V: those with at least one K channel."""
        return float((self.kept_counts > 0).mean())

    @property
    def far_bytes_share(self) -> float:
        """Bytes of a far token against dense: K and V weigh the same in a dense cache."""
        return (self.k_kept + self.v_kept) / 2
