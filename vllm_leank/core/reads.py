"""What a decode step reads of the cache of one request: no padding, and nothing of it twice but the
lead of segments that are chosen.

Reading bounds a step of long requests, so these bytes over a GPU's read rate are the time that it
takes at least, beside that of the weights.
"""

from dataclasses import astuple, dataclass

from vllm_leank.core.pages import CacheLayout, window_token_bytes
from vllm_leank.core.plan import CachePlan
from vllm_leank.core.selection import SEGMENT, Selection, selection_of
from vllm_leank.core.window import Window


@dataclass(frozen=True)
class Reads:
    """Bytes that are read, by what they are.

    Attributes:
        window: K and V of dense tokens.
        far: K and V of archived tokens, and their scales.
        lead: leads of archived K, by which segments are selected.
        other: what layers keep that stay vLLM's.
    """

    window: int = 0
    far: int = 0
    lead: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(astuple(self))

    def __add__(self, more: "Reads") -> "Reads":
        return Reads(*map(sum, zip(astuple(self), astuple(more), strict=True)))


def layer_reads(
    layout: CacheLayout, window: Window, length: int, selection: Selection | None = None
) -> Reads:
    """What the last query of a request of `length` tokens reads in one layer.

    Args:
        layout: the layer's pages.
        window: the dense window.
        length: tokens of the request.
        selection: how many segments of far tokens are read; None: all.
    """
    archived = max(window.boundary(length) - window.sink, 0)
    form = layout.archive_format
    dense = window_token_bytes(len(layout.profiles), layout.head_dim, layout.itemsize)
    far = archived * sum(form.token_bytes(one, layout.itemsize) for one in layout.profiles)
    lead = 0
    if selection is not None:
        fields = [part.k_chunks[0].width for part in layout.heads if part is not None]
        lead = archived * sum(fields) * layout.archive_itemsize
        segments = -(-archived // SEGMENT)
        far = far * selection.count(segments) // max(segments, 1)
    return Reads((length - archived) * dense, far, lead)


def step_reads(
    plan: CachePlan, window: Window, length: int, selection: Selection | None = None
) -> Reads:
    """What a decode step reads of a request of `length` tokens over all layers, on the
    tensor-parallel rank that reads most; a draft model's layers are not counted.

    Args:
        plan: page sizes of the model.
        window: the dense window.
        length: tokens of the request.
        selection: how many segments of far tokens are read, but for the first layers; None: all.
    """
    layers = range(len(plan.profiles))

    def of_rank(rank: int) -> Reads:
        parts = (
            layer_reads(plan.layer(layer, rank), window, length, selection_of(selection, layer))
            for layer in layers
        )
        return sum(parts, Reads(other=plan.other_bytes(length)))

    return max(map(of_rank, range(plan.tp_size)), key=lambda reads: reads.total)
