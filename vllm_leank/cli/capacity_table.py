"""Capacity as a table and as JSON, for `leank plan` and `leank doctor`."""

from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from vllm_leank.cli.sizes import readable
from vllm_leank.core.capacity import Capacity


def capacity_table(capacities: dict[str, Capacity], length: int) -> Table:
    """A row per way to keep the cache; ratios are against the first.

    80 columns hold numbers of seven digits; where there is less room, names wrap.
    """
    table = Table(
        title=f"requests of {length:,} tokens that fit",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("")
    for name in (
        "at\nonce",
        "",
        "in\nprefill",
        "far token\nbytes",
        "page\ntokens",
        "block\nbytes",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    first = next(iter(capacities.values()))
    for name, one in capacities.items():
        table.add_row(
            name,
            _count(one.at_once),
            f"{one.at_once / first.at_once:.2f}x",
            _count(one.in_prefill),
            f"{one.far_token_bytes:,}",
            "" if one.archive_block is None else f"{one.archive_block}",
            "" if one.block_bytes is None else f"{one.block_bytes:,}",
        )
    return table


def what_a_step_reads(capacities: dict[str, Capacity], weights: int | None = None) -> str:
    """A sentence for under the table; `weights` are the bytes of those on each GPU."""
    found = [
        f"{readable(one.step_bytes)} with {name}"
        for name, one in capacities.items()
        if one.step_bytes is not None
    ]
    beside = f", and {readable(weights)} of weights once for all" if weights else ""
    reads = "a decode step reads, on each GPU, of the cache of each request"
    return f"{reads}: {'; '.join(found)}{beside}"


def what_does_not_fit(capacities: dict[str, Capacity]) -> str:
    """Sentences for under the table if not even one request fits with leank, else nothing."""
    if capacities["leank"].in_prefill >= 1:
        return ""
    too_long = [name for name, one in capacities.items() if one.in_prefill < 1]
    return (
        f"A request this long does not fit while its prompt is computed: {'; '.join(too_long)}. "
        "vLLM would not start; give less --max-model-len or more memory."
    )


def what_fits_with_leank_alone(capacities: dict[str, Capacity]) -> str:
    """A sentence for under the table if a request fits, but not in a dense cache, else nothing."""
    dense = [name for name, one in capacities.items() if name != "leank" and one.in_prefill < 1]
    if not dense or capacities["leank"].in_prefill < 1:
        return ""
    return (
        "A request this long fits with leank; without it vLLM would not start, as it does not fit: "
        f"{'; '.join(dense)}."
    )


def _count(requests: float) -> str:
    """A tenth of a request matters only where few fit."""
    return f"{requests:,.1f}" if requests < 1000 else f"{requests:,.0f}"


def capacity_json(capacities: dict[str, Capacity]) -> list[dict[str, Any]]:
    """The table's numbers, unrounded."""
    first = next(iter(capacities.values()))
    return [
        {
            "name": name,
            **asdict(one),
            "ratio_in_decode": one.in_decode / first.in_decode,
            "ratio_at_once": one.at_once / first.at_once,
        }
        for name, one in capacities.items()
    ]
