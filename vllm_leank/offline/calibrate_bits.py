"""What masks are made of without training: what each channel costs, with how many bits.

Prompts are read twice. The first reading tells what far K and V are like (`statistics`), so that
there are codes for them; the second, by backward passes, what answers lose with codes of 8, 4 and 2
bits and with means alone (`code_losses`). Bits go where they save most (`allocate`,
`weigh_layers`).

K's mean is taken after RoPE, one number for all positions, as that is what mask files hold and
engines read. Scales are standard deviations, K's fitted to its codes (`fit_scales`); of V engines
store one scale per token beside, in units of these.

Engines do not look at far tokens of heads without any bits, where the loss speaks of reading them
as means. `benchmarks/real/kl.py` measures both: these are heads that hardly look far, and there is
no difference. A share of the heads can be asked to have none (`streaming`), which takes a third
reading. What they lose is measured as it is; bits, or a ratio, are then those of the other heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from vllm_leank.core.formats.packed import CODE_CLASSES
from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.statistics import Statistics
from vllm_leank.offline.allocate import Allocation, Losses
from vllm_leank.offline.calibration_prompts import CalibrationPrompts
from vllm_leank.offline.code_losses import Known, code_losses
from vllm_leank.offline.fisher import QUERIES, observe_far
from vllm_leank.offline.fit_scales import KeySample, fitted_scales
from vllm_leank.offline.mask_request import MaskRequest
from vllm_leank.offline.statistics import ChannelStatistics, StatisticsMeter
from vllm_leank.offline.streaming import StreamingHeads, head_losses, streaming_heads

BY_LOSS = "squares of gradients times errors of codes, summed over far tokens"
"""What provenances call the costs of channels."""


@dataclass(frozen=True)
class Measured:
    """What masks of any number of bits are made of, and what their provenance says of it.

    Attributes:
        statistics: of far K and V, scales as standard deviations.
        k_scales: of K, `[L, H, D]`, fitted to codes of so many bits.
        k_losses: what channels of K cost, by bits.
        v_losses: the same of V.
        provenance: what was read, and how.
        streaming: heads that shall see no far tokens, if any.
    """

    statistics: ChannelStatistics
    k_scales: Mapping[int, npt.NDArray[np.float64]]
    k_losses: Losses
    v_losses: Losses
    provenance: dict[str, Any]
    streaming: StreamingHeads | None = None

    @property
    def blind(self) -> npt.NDArray[np.bool_] | None:
        """Heads that get nothing whatever their channels lose, `[L, H]`; None where there are
        none.
        """
        return None if self.streaming is None else self.streaming.heads

    def told(self) -> dict[str, Any]:
        """What every mask's provenance says of this."""
        told = self.provenance | {"score": BY_LOSS}
        if self.streaming is not None:
            told["streaming"] = self.streaming.provenance
        return told

    def for_codes(self, chosen: Allocation) -> Statistics:
        """Statistics for a mask of these bits."""
        k_scale = self.statistics.k_scale.copy()
        for kind, scale in self.k_scales.items():
            k_scale[chosen.k_bits == kind] = scale[chosen.k_bits == kind]
        return replace(self.statistics, k_scale=k_scale).for_mask()


def measure(
    model: transformers.PreTrainedModel,
    prompts: CalibrationPrompts,
    window: Window,
    seed: int = 0,
    streaming: float = 0,
) -> Measured:
    """Statistics of a model's channels over prompts, and what answers lose with codes of them, and
    without far tokens in a share `streaming` of the heads.

    Raises:
        UserError: no prompt has far tokens, the model's attention cannot be observed, or
            `streaming` is out of range.
    """
    prompts = prompts.with_far(window)
    meter, keys = StatisticsMeter(Geometry.from_hf_config(model.config), rotation=None), KeySample()

    def observe(layer: int, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        for one in (meter, keys):
            one(layer, first, key, value)

    observe_far(model, prompts.ids, window, observe)
    provenance = {
        "method": "calibrate",
        **prompts.provenance,
        "queries": QUERIES,
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    statistics = meter.statistics()
    k_scales = {
        bits: fitted_scales(keys, statistics.k_mean, statistics.k_scale, bits, model.device)
        for bits in CODE_CLASSES
    }
    known = Known(statistics, k_scales)
    k_losses, v_losses = code_losses(model, prompts.ids, window, known, seed=seed)
    heads = None
    if streaming:
        losses = head_losses(model, prompts.ids, window, seed=seed)
        heads = streaming_heads(losses, streaming)
    return Measured(statistics, k_scales, k_losses, v_losses, provenance, heads)


def pruned_mask(request: MaskRequest, measured: Measured) -> Mask:
    """A mask that prunes K as LeanK does, with channels that are pruned read as their means, and
    chosen by what that costs.
    """
    return request.mask(
        measured.k_losses[0], measured.told(), measured.statistics.for_mask(), measured.blind
    )
