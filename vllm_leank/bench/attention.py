"""Times decode attention of a mask's layers beside FlashAttention, on random pages.

A case is a batch of requests of one length. For every layer of the mask, the pages, the tables and
the kernels are those of a server; only the contents are random. What the timed calls put out is
compared with the reference.

Times are of calls within one CUDA graph, as servers decode, each on pages that no call before it
has left in the L2 cache. `eager_ms` is that of one call launched from Python.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from vllm_leank.bench.cases import Case
from vllm_leank.bench.correctness import check_output
from vllm_leank.bench.flash import FLASH, FLASH_EIGHT_BIT, FlashDecode
from vllm_leank.bench.pools import Tables, layer_cache
from vllm_leank.bench.timing import copies_needed, eager_ms, graph_ms, read_limit, release
from vllm_leank.core.page_sizes import plan_cache
from vllm_leank.core.plan import CachePlan
from vllm_leank.core.selection import Selection, selection_of, unparted
from vllm_leank.errors import UserError
from vllm_leank.kernels import reference
from vllm_leank.kernels.batch import Batch
from vllm_leank.kernels.cache import LayerCache
from vllm_leank.kernels.channels import layer_channels
from vllm_leank.kernels.decode import decode
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.settings import choose_format

CHECKED_ROWS = 2
"""Requests whose outputs are compared, at most."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """What is measured besides cases: a mask's layers, and how they are served.

    Attributes:
        mask: the mask.
        layers: the layers to measure.
        query_heads: query heads of a layer.
        dtype: of the model.
        selection: how many segments of far tokens are read; None: all.
    """

    mask: Mask
    layers: Sequence[int]
    query_heads: int
    dtype: torch.dtype
    selection: Selection | None = None

    def __post_init__(self) -> None:
        if self.query_heads < 1 or self.query_heads % self.kv_heads:
            raise UserError(
                f"--query-heads is {self.query_heads}; it must be a multiple of the mask's "
                f"{self.kv_heads} KV heads"
            )

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer."""
        return self.mask.geometry.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.mask.geometry.head_dim

    @property
    def scale(self) -> float:
        """Factor of the QK product."""
        return float(self.head_dim**-0.5)

    @cached_property
    def plan(self) -> CachePlan:
        """Page sizes."""
        return plan_cache(
            self.mask.profiles,
            self.head_dim,
            self.dtype.itemsize,
            archive_format=choose_format(self.mask, self.selection is not None),
            unparted=unparted(self.selection),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the result file."""
        return {
            "query_heads": self.query_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "layers": list(self.layers),
            "segments": None if self.selection is None else asdict(self.selection),
        }


def measure(
    shape: Shape, cases: Sequence[Case], tell: Callable[[str], None], device: str = "cuda"
) -> Iterator[dict[str, Any]]:
    """Measure all cases; `tell` gets a line on what is done now and then.

    Yields:
        All that has been measured, after each case.

    Raises:
        CorrectnessError: a kernel's output is wrong.
    """
    torch.manual_seed(0)
    limit = read_limit(torch.device(device))
    tell(f"read limit: {limit / 1e12:.2f} TB/s")
    measured: list[dict[str, Any]] = []
    for case in cases:
        measured.append(_measure_case(shape, case, limit, device, tell))
        yield {"shape": shape.as_dict(), "read_limit_tb_s": limit / 1e12, "cases": measured}


def _measure_case(
    shape: Shape, case: Case, limit: float, device: str, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Figures of a case."""
    query = torch.randn(case.batch, shape.query_heads, shape.head_dim, device=device)
    query = (2 * query).to(shape.dtype)
    flash = {FLASH: _time_flash(shape, case, query, eight_bit=False)}
    if flash[FLASH]["version"] == 3:
        flash[FLASH_EIGHT_BIT] = _time_flash(shape, case, query, eight_bit=True)
    layers = []
    for layer in shape.layers:
        layers.append(_time_layer(shape, case, query, layer))
        tell(f"{case}, layer {layer}: {layers[-1]['ms']:.4f} ms")
    for row in layers:
        row |= _rates(row, flash, limit)
    mean = {key: statistics.mean(row[key] for row in layers) for key in ("ms", "eager_ms")}
    mean["bytes"] = round(statistics.mean(row["bytes"] for row in layers))
    return {
        "batch": case.batch,
        "length": case.length,
        "sink": case.window.sink,
        "recent": case.window.recent,
        "archive_format": shape.plan.archive_format.name,
        "archive_block": shape.plan.archive_block,
        **{name: row | _rates(row, {}, limit) for name, row in flash.items()},
        "mean": mean | _rates(mean, flash, limit),
        "layers": layers,
    }


def _rates(row: dict[str, Any], flash: dict[str, Any], limit: float) -> dict[str, Any]:
    """What follows from milliseconds and bytes."""
    rate = row["bytes"] / row["ms"] * 1e3
    rates = {"tb_s": rate / 1e12, "share_of_read_limit": rate / limit}
    for name, other in flash.items():
        rates[f"speedup_{name}"] = other["ms"] / row["ms"]
        rates[f"bound_{name}"] = other["bytes"] / row["bytes"]
    return rates


def _time_flash(
    shape: Shape, case: Case, query: torch.Tensor, *, eight_bit: bool
) -> dict[str, Any]:
    """Time FlashAttention on dense pages."""
    itemsize = 1 if eight_bit else shape.dtype.itemsize
    read = case.dense_bytes(shape.kv_heads, shape.head_dim, itemsize)
    copies = copies_needed(read, query.device)
    flash = FlashDecode.random(case, query, shape.kv_heads, copies, eight_bit=eight_bit)
    figures = {
        "version": flash.version,
        "ms": graph_ms(flash.calls(graph=True)),
        "bytes": read,
    }
    expected = torch.stack([flash.expected(row) for row in range(min(CHECKED_ROWS, case.batch))])
    name = FLASH_EIGHT_BIT if eight_bit else FLASH
    figures["error"] = check_output(name, case, flash.output[: len(expected)], expected)
    figures["eager_ms"] = eager_ms(flash.calls(graph=False)[-1])
    del flash
    release()
    return figures


def _time_layer(shape: Shape, case: Case, query: torch.Tensor, layer: int) -> dict[str, Any]:
    """Time our decode on the pages of a layer of the mask."""
    layout = shape.plan.layer(layer)
    selection = selection_of(shape.selection, layer)
    read = case.read_bytes(layout, selection)
    device = query.device
    tables = Tables.shuffled(case, layout, copies_needed(read, device), device)
    channels = layer_channels(*shape.mask.layer(layer, range(shape.kv_heads)))
    cache = layer_cache(layout, channels, case, tables, shape.dtype)
    cache = replace(cache, selection=selection)
    output = torch.full_like(query, float("nan"))
    calls = [decode_call(query, output, cache, batch, shape.scale) for batch in tables.batches]
    figures = {
        "layer": layer,
        "kept": list(layout.kept),
        "ms": graph_ms(calls),
        "bytes": read,
    }
    expected = _reference(query, cache, tables.batches[-1], shape.scale)
    name = f"leank, layer {layer}"
    figures["error"] = check_output(name, case, output[: len(expected)], expected)
    figures["eager_ms"] = eager_ms(calls[-1])
    del cache, calls, tables
    release()
    return figures


def decode_call(
    query: torch.Tensor, output: torch.Tensor, cache: LayerCache, batch: Batch, scale: float
) -> Callable[[], object]:
    """The launch that is timed: decode of one query per request."""
    return partial(decode, query, output, cache, batch, scale)


def _reference(query: torch.Tensor, cache: LayerCache, batch: Batch, scale: float) -> torch.Tensor:
    """The reference's output for the first requests of a batch, fp32."""
    rows = min(CHECKED_ROWS, len(query))
    some = replace(
        batch,
        query_start_loc=batch.query_start_loc[: rows + 1],
        query_start_loc_cpu=batch.query_start_loc_cpu[: rows + 1],
        seq_lens=batch.seq_lens[:rows],
        exact_until=batch.exact_until[:rows],
    )
    output = torch.empty_like(query[:rows], dtype=torch.float32)
    reference.attend(query[:rows].float(), output, cache, some, scale)
    return output
