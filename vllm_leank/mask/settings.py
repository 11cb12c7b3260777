"""What a mask and the options decide together: the dense window and the page sizes."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_leank.core.formats import ArchiveFormat, formats_for
from vllm_leank.core.layers import SlidingLayers
from vllm_leank.core.options import OptionError, Options
from vllm_leank.core.page_sizes import plan_cache
from vllm_leank.core.plan import CachePlan
from vllm_leank.core.selection import Selection, selection_of, unparted
from vllm_leank.core.states import StateLayers
from vllm_leank.core.window import Window, whole_granules
from vllm_leank.errors import UserError
from vllm_leank.mask.mask import Mask

PAGES = "leank option pages"

DENSE_ITEM = 2
"""Bytes of a number of 16 bits, in which dense caches are unless said otherwise."""


@dataclass(frozen=True)
class Settings:
    """Everything that the mask and the options decide.

    Attributes:
        mask: the mask in use.
        window: the dense window.
        plan: page sizes of every layer.
        selection: how many segments of far tokens queries read; None: all.
    """

    mask: Mask
    window: Window
    plan: CachePlan
    selection: Selection | None = None

    def __str__(self) -> str:
        """A few words: vLLM shows them in a label of its metrics."""
        return f"mask of {self.mask.model}, sha256 {(self.mask.sha256 or 'none')[:12]}"

    def selection_of(self, layer: int) -> Selection | None:
        """That of a layer, one of those that are served."""
        return selection_of(self.selection, layer)


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
        UserError: no archive format can store what the mask keeps, or the options ask for what it
            has not.
    """
    selection = None if options.pages is None else Selection.of(options.pages)
    if selection is not None and options.prefill != "exact":
        raise OptionError(f"{PAGES} works with prefill: exact alone; leave out one of the two")
    archive_format = choose_format(mask, selection is not None)
    plan = plan_cache(
        mask.profiles,
        mask.geometry.head_dim,
        itemsize,
        tp_size,
        archive_format=archive_format,
        draft_items=draft_items,
        stages=stages,
        sliding=sliding,
        states=states,
        unparted=unparted(selection),
    )
    return Settings(mask, _window(options, mask), plan, selection)


def choose_format(mask: Mask, selects: bool = False) -> ArchiveFormat:
    """The first format that takes all of the mask's heads.

    Args:
        mask: what is stored.
        selects: whether queries select the segments of far tokens that they read.

    Raises:
        UserError: none can store what the mask keeps, or there is nothing to select by.
    """
    fitting = formats_for(mask.profiles)
    if not fitting:
        raise UserError(
            f"the mask for {mask.model} has heads with channels of 16 bits beside heads with "
            "fewer, which no archive can hold; take a mask with one of both"
        )
    found = fitting[0]
    storing = [one for layer in mask.profiles for one in layer if one.stores]
    if selects and not all(map(found.lead, storing)):
        raise OptionError(
            f"{PAGES} needs bits for K in all heads that have any for V, by which tokens are "
            f"selected, and the mask for {mask.model} has heads without; leave out pages"
        )
    return found


def _window(options: Options, mask: Mask) -> Window:
    """The dense window: options first, then what the mask was made for."""
    sink = options.sink if options.sink is not None else whole_granules(mask.sink)
    recent = options.recent if options.recent is not None else mask.recent
    return Window(sink, recent, exact=options.prefill == "exact")


def dense_bytes(mask: Mask) -> int:
    """Bytes of a token in a dense cache of 16 bits."""
    return mask.k_bits.size * 2 * DENSE_ITEM


def stored_bytes(mask: Mask) -> int:
    """Bytes of a far token in a server's archive pages, as its log says; of a mask that no archive
    can hold, those of its channels.
    """
    if not mask.far_bytes_share:
        return 0
    try:
        return plan_settings(mask, Options(), DENSE_ITEM).plan.archive_token_bytes
    except UserError:
        return round(dense_bytes(mask) * mask.far_bytes_share)
