"""The table that `leank bench serve` prints."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_serve(results: dict[str, Any]) -> None:
    """Print a row per variant; in brackets, against the first."""
    load = results["load"]
    table = Table(
        title=f"{load['model']}, prompts of {load['prompt_tokens']:,} tokens",
        caption="\n".join(["in brackets: against the first", *_short(results)]),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("variant")
    for name in ("requests\nat once", "decode\ntokens/s", "first token\ns"):
        table.add_column(name, justify="right")
    table.add_column("per token, ms\np50", justify="right")
    table.add_column("\np99", justify="right")
    against = {ratio["variant"]: ratio for ratio in results["ratios"]}
    for one in results["variants"]:
        ratio, decode = against.get(one["variant"]), one["decode"]
        cells = {
            "concurrent": f"{one['concurrent']}",
            "tokens_per_s": f"{decode['tokens_per_s']:,.0f}",
            "ttft": _seconds(one["ttft_s"]["median"]),
            "tpot_p50": f"{decode['tpot_p50_ms']:.2f}",
        }
        if ratio is not None:
            cells = {
                name: cell if ratio[name] is None else f"{cell}\n({ratio[name]:.2f}x)"
                for name, cell in cells.items()
            }
        table.add_row(one["variant"], *cells.values(), f"{decode['tpot_p99_ms']:.2f}")
    Console().print(table)


def _short(results: dict[str, Any]) -> list[str]:
    """Of variants that decoded steadily for fewer steps than were asked for."""
    asked = results["load"]["steady_steps"]
    return [
        f"{one['variant']}: {steps} steps of the {asked} asked for; more requests may fit"
        for one in results["variants"]
        if (steps := one["decode"]["steps"]) < asked
    ]


def _seconds(time: float | None) -> str:
    """Of first tokens, which may not have been timed."""
    return "-" if time is None else f"{time:.3f}"
