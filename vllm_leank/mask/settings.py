"""What a mask and the options decide together: the dense window and the page sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_leank.core.formats import find_format
from vllm_leank.core.options import Options
from vllm_leank.core.plan import CachePlan, plan_cache
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
) -> Settings:
    """The settings of a mask and options; see `plan_cache` for the rest.

    Raises:
        UserError: the mask has channels of 2, 4 or 8 bits, for which there are no pages yet.
    """
    if mask.is_packed:
        raise UserError(
            f"the mask for {mask.model} has channels of 2, 4 or 8 bits, which cannot be served "
            "yet; take one that keeps channels whole"
        )
    plan = plan_cache(
        mask.kept_counts.tolist(),
        mask.geometry.head_dim,
        itemsize,
        tp_size,
        archive_format=find_format(options.archive_dtype),
        draft_items=draft_items,
        stages=stages,
    )
    return Settings(mask, _window(options, mask), plan)


def _window(options: Options, mask: Mask) -> Window:
    """The dense window: options first, then what the mask was made for."""
    sink = options.sink if options.sink is not None else whole_pages(mask.sink)
    recent = options.recent if options.recent is not None else mask.recent
    return Window(sink, recent, exact=options.prefill == "exact")
