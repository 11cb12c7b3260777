"""What a server runs with: the mask, the dense window and the page sizes, from vLLM's config."""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from vllm_leank.geometry import Geometry
from vllm_leank.layout import CachePlan, plan_cache
from vllm_leank.mask import Mask
from vllm_leank.mask_resolver import resolve_mask
from vllm_leank.options import OptionError, Options, parse_options
from vllm_leank.window import STEP, Window

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Settings:
    """Everything that the mask and the options decide.

    Attributes:
        mask: the mask in use.
        window: the dense window.
        plan: page sizes of every layer.
    """

    mask: Mask
    window: Window
    plan: CachePlan


def load_settings(vllm_config: "VllmConfig") -> Settings:
    """Read options and mask, and plan the cache. Every process does so, from the same files.

    Raises:
        OptionError: an option is unknown or out of range.
        MaskError: no mask was found, or it is faulty or does not fit the model.
    """
    options = parse_options(vllm_config.additional_config)
    model = vllm_config.model_config
    geometry = Geometry.from_hf_config(model.hf_text_config)
    return _load_settings(
        options,
        model.model,
        json.dumps(geometry.as_dict()),
        model.dtype.itemsize,
        vllm_config.parallel_config.tensor_parallel_size,
    )


@lru_cache(maxsize=8)
def _load_settings(
    options: Options, model: str, geometry: str, itemsize: int, tp_size: int
) -> Settings:
    mask = resolve_mask(options.mask, model, Geometry(**json.loads(geometry)))
    return Settings(
        mask=mask,
        window=_window(options, mask),
        plan=plan_cache(mask.kept_counts.tolist(), mask.geometry.head_dim, itemsize, tp_size),
    )


def _window(options: Options, mask: Mask) -> Window:
    """The dense window: options first, then what the mask was made for. A mask's sink that does
    not fill whole pages is rounded up, which keeps more tokens dense, never fewer.
    """
    sink = options.sink if options.sink is not None else -(-mask.sink // STEP) * STEP
    recent = options.recent if options.recent is not None else mask.recent
    try:
        return Window(sink, recent)
    except ValueError as error:
        raise OptionError(f"leank option {error}") from None


def cache_dtype(vllm_config: "VllmConfig") -> torch.dtype:
    """Dtype of the pages: the model's."""
    return vllm_config.model_config.dtype
