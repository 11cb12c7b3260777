"""What a mask and the options decide together: the dense window and the page sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_leank.core.formats import ArchiveFormat, formats_for
from vllm_leank.core.layers import SlidingLayers
from vllm_leank.core.options import Options
from vllm_leank.core.plan import CachePlan, plan_cache
from vllm_leank.core.states import StateLayers
from vllm_leank.core.window import Window, whole_pages
from vllm_leank.errors import UserError
from vllm_leank.mask.mask import Mask


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


def plan_settings(
    mask: Mask,
    options: Options,
    itemsize: int,
    tp_size: int = 1,
    draft_items: int = 0,
    stages: Sequence[int] | None = None,
    sliding: SlidingLayers | None = None,
    states: StateLayers | None = None,
) -> Settings:
    """The settings of a mask and options; see `plan_cache` for the rest.

    Raises:
        UserError: no archive format can store what the mask keeps.
    """
    plan = plan_cache(
        mask.profiles,
        mask.geometry.head_dim,
        itemsize,
        tp_size,
        archive_format=choose_format(mask),
        draft_items=draft_items,
        stages=stages,
        sliding=sliding,
        states=states,
    )
    return Settings(mask, _window(options, mask), plan)


def choose_format(mask: Mask) -> ArchiveFormat:
    """The first format that takes all of the mask's heads.

    Raises:
        UserError: none can store what the mask keeps.
    """
    fitting = formats_for(mask.profiles)
    if not fitting:
        raise UserError(
            f"the mask for {mask.model} has heads with channels of 16 bits beside heads with "
            "fewer, which no archive can hold; take a mask with one of both"
        )
    return fitting[0]


def _window(options: Options, mask: Mask) -> Window:
    """The dense window: options first, then what the mask was made for."""
    sink = options.sink if options.sink is not None else whole_pages(mask.sink)
    recent = options.recent if options.recent is not None else mask.recent
    return Window(sink, recent, exact=options.prefill == "exact")
