"""Makes a mask of bits without training: what each channel needs, by what it is worth.

A backward pass per prompt says how much answers depend on each channel of far K and V (`fisher`);
the same pass adds up what these are like (`statistics`). The cost of knowing a channel by its mean
alone is sensitivity times variance, and bits go where they save most (`allocate`).

K's mean is taken after RoPE, one number for all positions, as that is what mask files hold and
engines read. V's scale is the standard deviation of a channel; engines store one scale per token
beside, in units of these.

Engines do not look at far tokens of heads without any bits, where the cost speaks of reading them
as means. `benchmarks/real/kl.py` measures both: these are heads that hardly look far, and there is
no difference, while some bits for each of them cost more than they give.
"""

import numpy as np
import transformers

from vllm_leank.core.geometry import Geometry
from vllm_leank.core.window import Window
from vllm_leank.mask.mask import Mask
from vllm_leank.offline.allocate import allocate
from vllm_leank.offline.calibration_prompts import CalibrationPrompts
from vllm_leank.offline.fisher import QUERIES, Sensitivities, sensitivities
from vllm_leank.offline.mask_request import BitsRequest, MaskRequest
from vllm_leank.offline.statistics import ChannelStatistics, StatisticsMeter

BY_VARIANCE = "Fisher information of far K and V * variance"
BY_SQUARE = "Fisher information of far K * mean square"
"""What provenances call the costs of channels."""


def measure(
    model: transformers.PreTrainedModel, prompts: CalibrationPrompts, window: Window, seed: int = 0
) -> tuple[Sensitivities, ChannelStatistics]:
    """Sensitivities and statistics of a model's channels over prompts.

    Raises:
        UserError: no prompt has far tokens, or the model's attention cannot be observed.
    """
    meter = StatisticsMeter(Geometry.from_hf_config(model.config), rotation=None)
    found = sensitivities(model, prompts.ids, window, seed=seed, observe=meter)
    return found, meter.statistics()


def bits_mask(
    request: BitsRequest,
    model: transformers.PreTrainedModel,
    prompts: CalibrationPrompts,
    seed: int = 0,
) -> Mask:
    """The mask of `request` for a model, measured on prompts.

    Raises:
        UserError: as in `measure`.
    """
    found, statistics = measure(model, prompts, request.window, seed)
    chosen = allocate(
        found.key * statistics.k_scale**2,
        found.value * statistics.v_scale**2,
        request.bits,
    )
    return request.mask(
        chosen, statistics.for_mask(), _provenance(model, prompts, seed, BY_VARIANCE)
    )


def pruned_mask(
    request: MaskRequest,
    model: transformers.PreTrainedModel,
    prompts: CalibrationPrompts,
    seed: int = 0,
) -> Mask:
    """A mask that prunes K as LeanK does, with channels chosen by what reading them as 0 costs.

    Raises:
        UserError: as in `measure`.
    """
    found, statistics = measure(model, prompts, request.window, seed)
    cost: np.ndarray = found.key * statistics.k_square
    return request.mask(cost, _provenance(model, prompts, seed, BY_SQUARE))


def _provenance(
    model: transformers.PreTrainedModel, prompts: CalibrationPrompts, seed: int, score: str
) -> dict[str, object]:
    return {
        "method": "calibrate",
        "score": score,
        **prompts.provenance,
        "queries": QUERIES,
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
