"""What is asked of a mask that is to be made, checked before the work begins."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from vllm_leank.core.window import Window
from vllm_leank.errors import UserError
from vllm_leank.mask.bits import check_bits_asked
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.mask import BITS_ALIGN, Mask
from vllm_leank.mask.select_channels import select_channels
from vllm_leank.mask.statistics import Statistics
from vllm_leank.offline.allocate import Allocation
from vllm_leank.offline.streaming import check_share
from vllm_leank.version import __version__


@dataclass(frozen=True)
class MaskRequest:
    """A mask for `checkpoint` that prunes `ratio` of its K channels; with a share `streaming` of
    the heads that keep nothing, of those of the other heads.

    Raises:
        UserError: ratio, align, streaming or the model's id is out of range, or does not fit the
            model.
    """

    checkpoint: Checkpoint
    ratio: float
    align: int
    window: Window
    streaming: float = 0

    def __post_init__(self) -> None:
        check_share(self.streaming, _heads(self.checkpoint))
        if not 0 <= self.ratio <= 1:
            raise UserError(
                f"ratio is {self.ratio}; it must lie between 0 (keep all) and 1 (prune all)"
            )
        Mask.full(
            self.checkpoint.geometry,
            model=self.checkpoint.id,
            align=self.align,
            sink=self.window.sink,
            recent=self.window.recent,
        )

    @classmethod
    def open(
        cls,
        model: str,
        model_id: str | None,
        *,
        ratio: float,
        align: int,
        sink: int,
        recent: int,
        streaming: float = 0,
        overrides: Mapping[str, Any] | None = None,
    ) -> "MaskRequest":
        """The request with the options of the command line; reads the model's config.

        Raises:
            UserError: as above, or the window is out of range, or there is no such model.
        """
        window = window_of(sink, recent)
        checkpoint = Checkpoint.open(model, model_id, overrides=overrides)
        return cls(checkpoint, ratio, align, window, streaming)

    def mask(
        self,
        scores: npt.NDArray[np.float64],
        provenance: dict[str, Any],
        statistics: Statistics | None = None,
        blind: npt.NDArray[np.bool_] | None = None,
    ) -> Mask:
        """The mask of the channels with the best `scores` `[L, H, D]`, none of them in heads where
        `blind` (`[L, H]`); others are read as their means where there are statistics, else as 0.

        `provenance` gets what every mask should tell: ratio, date, versions.
        """
        seeing = np.ones(scores.shape[:2], bool) if blind is None else ~blind
        keep = np.zeros(scores.shape, bool)
        keep[seeing] = select_channels(scores[seeing][None], self.ratio, self.align)[0]
        mask = Mask.from_keep(
            keep,
            self.checkpoint.geometry,
            model=self.checkpoint.id,
            align=self.align,
            sink=self.window.sink,
            recent=self.window.recent,
            provenance=provenance
            | {
                "ratio": float(self.ratio),
                "achieved": round(1 - float(keep.mean()), 6),
                **made_by(),
            },
        )
        return mask if statistics is None else mask.with_means(statistics)


@dataclass(frozen=True)
class BitsRequest:
    """A mask for `checkpoint` of `bits` per element over K and V; with a share `streaming` of the
    heads that have none, over those of the other heads.

    Raises:
        UserError: bits, streaming or the model's id is out of range, or does not fit the model.
    """

    checkpoint: Checkpoint
    bits: float
    window: Window
    streaming: float = 0

    def __post_init__(self) -> None:
        check_share(self.streaming, _heads(self.checkpoint))
        check_bits_asked(self.bits)
        geometry, window = self.checkpoint.geometry, self.window
        Mask.full(
            geometry,
            model=self.checkpoint.id,
            align=BITS_ALIGN,
            sink=window.sink,
            recent=window.recent,
        )

    @classmethod
    def open(
        cls,
        model: str,
        model_id: str | None,
        *,
        bits: float,
        sink: int,
        recent: int,
        streaming: float = 0,
        overrides: Mapping[str, Any] | None = None,
    ) -> "BitsRequest":
        """The request with the options of the command line; reads the model's config.

        Raises:
            UserError: as above, or the window is out of range, or there is no such model.
        """
        checkpoint = Checkpoint.open(model, model_id, overrides=overrides)
        return cls(checkpoint, bits, window_of(sink, recent), streaming)

    def mask(self, chosen: Allocation, statistics: Statistics, provenance: dict[str, Any]) -> Mask:
        """The mask of these bits; `provenance` gets what every mask should tell."""
        return Mask.from_bits(
            chosen.k_bits,
            chosen.v_bits,
            self.checkpoint.geometry,
            model=self.checkpoint.id,
            statistics=statistics,
            sink=self.window.sink,
            recent=self.window.recent,
            provenance=provenance
            | {
                "bits": float(self.bits),
                "achieved": round(chosen.mean_bits, 6),
                **self._revision(),
                **made_by(),
            },
        )

    def _revision(self) -> dict[str, str]:
        revision = self.checkpoint.hub.get("revision")
        return {} if revision is None else {"revision": revision}


def _heads(checkpoint: Checkpoint) -> int:
    """KV heads of all layers that a mask is for."""
    layers, heads, _ = checkpoint.geometry.shape
    return layers * heads


def window_of(sink: int, recent: int) -> Window:
    """The window of options.

    Raises:
        UserError: they are out of range.
    """
    try:
        return Window(sink, recent)
    except ValueError as error:
        raise UserError(str(error)) from error


def made_by() -> dict[str, str]:
    """Date and versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "vllm_leank": __version__,
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
    }
