"""The cases of `leank bench attention`, and the bytes that decode has to read for them."""

from dataclasses import dataclass

from vllm_leank.core.pages import CacheLayout, window_token_bytes
from vllm_leank.core.reads import layer_reads
from vllm_leank.core.selection import Selection
from vllm_leank.core.window import Window
from vllm_leank.errors import UserError


@dataclass(frozen=True)
class Case:
    """A batch of requests of one length, each with one query at its last token.

    Attributes:
        batch: requests.
        length: tokens of each.
        window: the dense window.
    """

    batch: int
    length: int
    window: Window

    def __post_init__(self) -> None:
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def __str__(self) -> str:
        window = f"sink {self.window.sink}, recent {self.window.recent}"
        return f"{self.batch} x {self.length:,} tokens, {window}"

    def read_bytes(self, layout: CacheLayout, selection: Selection | None = None) -> int:
        """Bytes of K and V (and scales) that a layer's queries have to read, without padding; where
        segments are selected, leads as well.
        """
        return self.batch * layer_reads(layout, self.window, self.length, selection).total

    def dense_bytes(self, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes of K and V that dense attention has to read in a layer."""
        return self.batch * self.length * window_token_bytes(num_kv_heads, head_dim, itemsize)


def parse_case(text: str, sink: int, recent: int) -> Case:
    """A case from `BATCH,LENGTH[,SINK,RECENT]`; `sink` and `recent` are used where it has none.

    Raises:
        UserError: not of that form, or a value is out of range.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
        batch, length, *window = numbers
        if window:
            sink, recent = window
    except ValueError:
        raise UserError(
            f"case {text!r} is not BATCH,LENGTH or BATCH,LENGTH,SINK,RECENT, for example 64,32768"
        ) from None
    try:
        return Case(batch, length, Window(sink, recent))
    except ValueError as error:
        raise UserError(f"case {text!r}: {error}") from error


def parse_layers(text: str | None, num_layers: int) -> list[int]:
    """Layer indices from `0,5,9`; all of them without a text.

    Raises:
        UserError: not a list of layers that the mask has.
    """
    if text is None:
        return list(range(num_layers))
    try:
        layers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"layers {text!r} is not a list such as 0,5,9") from None
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise UserError(f"layer {layer} is not in the mask, which has 0 to {num_layers - 1}")
    return layers
