"""What the second stage starts from where there is no first one: Fisher's costs, or a mask."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from vllm_leank.errors import UserError
from vllm_leank.mask.file import load_mask
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.select_channels import select_channels
from vllm_leank.mask.statistics import Statistics
from vllm_leank.offline.calibrate_bits import measure
from vllm_leank.offline.calibration_prompts import calibration_prompts, longest_prompt
from vllm_leank.offline.mask_request import MaskRequest

KEPT, PRUNED = 0.6, 0.4
"""Factors of channels that a mask keeps, and of others: a low rate can make them change sides."""


@dataclass(frozen=True)
class Start:
    """Where the second stage begins.

    Attributes:
        factors: fp32 `[L, H, D]` from 0 to 1, larger for channels that are to be kept first.
        statistics: whose means pruned channels are read as; None: as 0.
        told: what the mask's provenance says of it.
    """

    factors: torch.Tensor
    statistics: Statistics | None
    told: dict[str, Any]


def by_fisher(
    model: transformers.PreTrainedModel, request: MaskRequest, data: Path | None, seed: int
) -> Start:
    """The mask of `leank mask calibrate --ratio`, from prompts of `data`, else built-in ones.

    Raises:
        UserError: the prompts or the model's attention cannot be used, or there is too little
            memory.
    """
    checkpoint, window = request.checkpoint, request.window
    longest = longest_prompt(checkpoint, None, str(model.device))
    prompts = calibration_prompts(checkpoint, data, window, max_tokens=longest, seed=seed)
    try:
        measured = measure(model, prompts, window, seed)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "not enough GPU memory to calibrate the mask that learning starts from; make it by "
            f"leank mask calibrate --ratio with a smaller --max-tokens, and give --from ({error})"
        ) from error
    told = measured.told()
    longest_read = {"longest_prompt": told["longest_prompt"]}
    return Start(
        ranks(measured.k_losses[0]),
        measured.statistics.for_mask(),
        longest_read | {"calibration": {k: v for k, v in told.items() if k != "method"}},
    )


def ranks(cost: npt.NDArray[np.float64]) -> torch.Tensor:
    """Factors fp32 `[L, H, D]` from 0 to 1, equally far apart, that rank channels as costs do."""
    place = cost.argsort(axis=None, kind="stable").argsort(kind="stable")
    return torch.from_numpy(place.reshape(cost.shape) / max(cost.size - 1, 1)).float()


def fitting_mask(path: Path, request: MaskRequest) -> Mask:
    """The mask in a file, which must be one of the request's: same geometry, window and ratio.

    Raises:
        UserError: it cannot be read, or is none.
    """
    mask = load_mask(path)
    if mismatch := mask.geometry.mismatch(request.checkpoint.geometry):
        raise UserError(f"{path}: is no start for {request.checkpoint.id}: {mismatch}")
    if mask.is_packed:
        raise UserError(
            f"{path}: is no start: it has channels of 2, 4 or 8 bits, and learning prunes K; make "
            "one by leank mask calibrate --ratio"
        )
    window = request.window
    if (mask.sink, mask.recent) != (window.sink, window.recent):
        raise UserError(
            f"{path}: is no start: it is for sink {mask.sink} and recent {mask.recent}, not "
            f"{window.sink} and {window.recent}; give --sink and --recent"
        )
    kept = select_channels(mask.keep.astype(np.float64), request.ratio, request.align)
    if not np.array_equal(kept, mask.keep):
        raise UserError(
            f"{path}: is no start for --ratio {request.ratio:g} and --align {request.align}: it "
            f"prunes {1 - mask.k_kept:.2%} of K in groups of {mask.align}"
        )
    return mask


def by_mask(mask: Mask) -> Start:
    """A mask that exists (`fitting_mask`)."""
    factors = torch.from_numpy(np.where(mask.keep, KEPT, PRUNED)).float()
    longest = mask.provenance.get("longest_prompt")
    told = {} if longest is None else {"longest_prompt": longest}
    return Start(factors, mask.statistics, told)
