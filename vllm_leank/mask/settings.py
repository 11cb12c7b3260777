"""What a mask and the options decide together: the dense window and the page sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_leank.core.formats import NATIVE, ArchiveFormat, find_format, formats_for
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
        UserError: no archive format, or not the one that is asked for, can store what the mask
            keeps.
    """
    plan = plan_cache(
        mask.profiles,
        mask.geometry.head_dim,
        itemsize,
        tp_size,
        archive_format=choose_format(options.archive_dtype, mask),
        draft_items=draft_items,
        stages=stages,
        sliding=sliding,
        states=states,
    )
    return Settings(mask, _window(options, mask), plan)


def choose_format(name: str, mask: Mask) -> ArchiveFormat:
    """The format that is asked for; by default the first that takes the mask's heads.

    Raises:
        UserError: it cannot store what the mask keeps.
    """
    fitting, asked = formats_for(mask.profiles), find_format(name)
    if asked in fitting:
        return asked
    if not fitting:
        raise UserError(
            f"the mask for {mask.model} has heads with channels of 16 bits beside heads with "
            "fewer, which no archive can hold; take a mask with one of both"
        )
    if asked == NATIVE:
        return fitting[0]
    kind = "2, 4 or 8 bits" if mask.is_packed else "16 bits"
    raise UserError(
        f"the mask for {mask.model} has channels of {kind}, which no {asked.archive} can hold: "
        f'remove archive_dtype "{asked.name}"'
    )


def _window(options: Options, mask: Mask) -> Window:
    """The dense window: options first, then what the mask was made for."""
    sink = options.sink if options.sink is not None else whole_pages(mask.sink)
    recent = options.recent if options.recent is not None else mask.recent
    return Window(sink, recent, exact=options.prefill == "exact")
