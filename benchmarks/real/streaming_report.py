"""What is told of masks with streaming heads: what they store, what fits, and the table."""

from typing import Any

from rich.console import Console
from rich.table import Table

from real.judged_texts import SEEN, UNSEEN
from vllm_leank.bench.results import describe_mask
from vllm_leank.cli.capacity_table import capacity_json
from vllm_leank.cli.sizes import parse_size
from vllm_leank.core.capacity import (
    BATCHED_TOKENS,
    STEPS_AT_ONCE,
    UTILIZATION,
    compare,
    estimate_pool,
)
from vllm_leank.core.layers import sliding_layers, state_layers
from vllm_leank.core.options import Options
from vllm_leank.mask.checkpoint import Checkpoint
from vllm_leank.mask.mask import Mask
from vllm_leank.mask.settings import plan_settings

ITEMSIZE = 2
"""Bytes of a number of the model as it is served."""


def described(
    checkpoint: Checkpoint, mask: Mask, way: str | None, share: float, gpu_memory: str, tokens: int
) -> dict[str, Any]:
    """What a mask stores and saves, and what fits with it."""
    config = checkpoint.plain or checkpoint.config
    sliding, states = sliding_layers(config), state_layers(config, ITEMSIZE, 1)
    settings = plan_settings(mask, Options(), ITEMSIZE, sliding=sliding, states=states)
    plan = settings.plan
    pool = estimate_pool(parse_size(gpu_memory), UTILIZATION, checkpoint.weight_bytes(ITEMSIZE))
    in_flight = STEPS_AT_ONCE * BATCHED_TOKENS
    engines = compare(plan, settings.window, pool, tokens, in_flight)
    return {
        "way": way,
        "share": share,
        **describe_mask(mask),
        "streaming": mask.provenance.get("streaming"),
        "bits": round(mask.bits, 4),
        "far_token_bytes": plan.archive_token_bytes,
        "saved": round(1 - plan.archive_token_bytes / plan.dense_token_bytes, 4),
        "capacity": capacity_json(engines),
        "kl": {},
    }


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("mask", "heads", "bytes", "saved", "x", "fit")
    lengths = sorted({int(length) for row in results["masks"].values() for length in row["kl"]})
    for length in lengths:
        table.add_column(f"KL, {length:,}", justify="right")
        table.add_column("other kinds", justify="right")
    for name, row in results["masks"].items():
        leank = row["capacity"][-1]
        streaming = row["streaming"] or {"heads": 0}
        cells = [
            name, f"{streaming['heads']}", f"{row['far_token_bytes']:,}", f"{row['saved']:.1%}",
            f"{1 / (1 - row['saved']):.2f}", f"{leank['ratio_in_decode']:.2f}x",
        ]  # fmt: skip
        for length in lengths:
            found = row["kl"].get(str(length), {})
            cells += [f"{found[kind]['kl']:.5f}" if kind in found else "-"
                      for kind in (SEEN, UNSEEN)]  # fmt: skip
        table.add_row(*cells)
    console = Console(width=140, highlight=False)
    console.print(table)
    for share, common in results["in_common"].items():
        console.print(f"share {share}: both ways choose {common['both']} of {common['each']} heads")
