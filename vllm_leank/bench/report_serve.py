"""The table that `leank bench serve` prints."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_leank.bench.steady import FEWEST_STEPS


def print_serve(results: dict[str, Any]) -> None:
    """Print a row per variant; in brackets, against the first."""
    load = results["load"]
    table = Table(
        title=f"{load['model']}, prompts of {load['prompt_tokens']:,} tokens",
        caption="\n".join(["in brackets: against the first", *_remarks(results)]),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("variant")
    for name in ("requests\nat once", "decode\ntokens/s", "first token\ns"):
        table.add_column(name, justify="right")
    table.add_column("per token, ms\np50", justify="right")
    table.add_column("\np99", justify="right")
    for one, ratio in zip(results["variants"], [None, *results["ratios"]], strict=True):
        decode = one["decode"]
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


def _remarks(results: dict[str, Any]) -> list[str]:
    """Of variants that were not full, or decoded steadily for fewer steps than were asked for."""
    load = results["load"]
    remarks = []
    for one in results["variants"]:
        steps, asked = one["decode"]["steps"], load["steady_steps"]
        if one["concurrent"] == one["engine"]["max_num_seqs"]:
            remark = "as many as the engine may run; room may be left: raise max_num_seqs"
        elif one["concurrent"] == load["num_prompts"]:
            remark = "all prompts ran at once; more may fit: raise --num-prompts"
        elif not one["waiting"]:
            remark = "nobody waited for room; more requests may fit"
        elif steps < min(FEWEST_STEPS, asked):
            remark = f"{steps} steps of the {asked} asked for; more requests may fit"
        elif steps < asked:
            remark = f"full for {steps} steps of the {asked} asked for"
        else:
            continue
        remarks.append(f"{one['variant']}: {remark}")
    return remarks


def _seconds(time: float | None) -> str:
    """Of first tokens, which may not have been timed."""
    return "-" if time is None else f"{time:.3f}"
