"""Which page sizes a mask's archive and its dense tokens have in vLLM's pool: chosen once, at
startup, so that little of a block is left empty.
"""

from collections.abc import Sequence
from dataclasses import replace

from vllm_leank.core.formats import NATIVE, ArchiveFormat
from vllm_leank.core.layers import SlidingLayers
from vllm_leank.core.pages import LEAST_BLOCK
from vllm_leank.core.plan import CachePlan
from vllm_leank.core.profile import Profile
from vllm_leank.core.states import StateLayers
from vllm_leank.core.window import GRANULE, Window

ARCHIVE_WASTE = 0.05
"""Share of a pool block that an archive page may leave empty."""

WINDOW_BLOCKS = tuple(range(LEAST_BLOCK, 16 * LEAST_BLOCK + 1, LEAST_BLOCK))
"""Tokens of a window page, to choose from beside states."""

NOMINAL_WINDOW, NOMINAL_LENGTHS = Window(64, 256), range(8192, 9216, GRANULE)
"""The requests for which window pages are chosen: of many lengths, as one may end with a page."""


def plan_cache(
    profiles: Sequence[Sequence[Profile]],
    head_dim: int,
    itemsize: int,
    tp_size: int = 1,
    archive_format: ArchiveFormat = NATIVE,
    draft_items: int = 0,
    stages: Sequence[int] | None = None,
    sliding: SlidingLayers | None = None,
    states: StateLayers | None = None,
    unparted: int = GRANULE,
) -> CachePlan:
    """Choose the page sizes for a mask.

    Args:
        profiles: class widths of every head, `[num_layers][num_kv_heads]`; for heads that keep
            channels whole, `profile.whole_heads` makes them from the numbers of channels.
        head_dim: channels of a head.
        itemsize: bytes of an element of a window page.
        tp_size: tensor-parallel ranks.
        archive_format: how far tokens are stored.
        draft_items: elements of a dense token of a draft model on each rank.
        stages: layers of each pipeline stage; by default one stage has all.
        sliding: layers that stay vLLM's.
        states: layers that stay vLLM's and keep states. A block is never smaller than a state, so
            beside them window pages are as long as leaves least of their blocks empty.
        unparted: tokens that no archive page may part: a page has a multiple of them.

    Returns:
        The plan. Its pages always give vLLM two cache groups, beside those of other layers.
    """
    known = archive_format.blocks + (archive_format.longer_blocks if states else ())
    blocks = [block for block in known if block % unparted == 0]
    plan = CachePlan(
        profiles=tuple(map(tuple, profiles)),
        head_dim=head_dim,
        itemsize=itemsize,
        archive_format=archive_format,
        tp_size=tp_size,
        stages=tuple(stages or (len(profiles),)),
        archive_block=blocks[-1],
        draft_items=draft_items,
        sliding=sliding,
        states=states,
    )
    if states is None:
        return filled(plan, blocks)
    plans = (filled(replace(plan, window_block=block), blocks) for block in WINDOW_BLOCKS)
    return min(plans, key=_waste)


def filled(plan: CachePlan, blocks: Sequence[int]) -> CachePlan:
    """The plan with archive pages of as many tokens as it takes to fill a pool block.

    A block is as large as the larger group's pages, and far tokens are most of what a long request
    holds: so their pages fill it, but for `ARCHIVE_WASTE` of it.
    """
    least = (1 - ARCHIVE_WASTE) * plan.stage_least_bytes
    # Each is asked for itself: how long a page is may change a token's bytes.
    plans = [replace(plan, archive_block=block) for block in blocks]
    return next((one for one in plans if one.archive_page_bytes >= least), plans[-1])


def _waste(plan: CachePlan) -> float:
    """Bytes of the blocks of nominal requests over the bytes that these fill, summed: each request
    counts once while its prompt is computed and once in decode.
    """
    window, waste = NOMINAL_WINDOW, 0.0
    for length in NOMINAL_LENGTHS:
        archived = window.archived(length)
        kept = archived * plan.archive_token_bytes + plan.other_bytes(length)
        for dense, blocks in (
            (length, plan.blocks_in_prefill(window, length)),
            (length - archived + window.sink, plan.blocks_in_decode(window, length)),
        ):
            waste += blocks * plan.block_bytes / (kept + dense * plan.dense_token_bytes)
    return waste
