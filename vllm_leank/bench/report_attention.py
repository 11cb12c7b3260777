"""The table that `leank bench attention` prints."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_leank.core.capacity import EIGHT_BIT_CACHE


def print_attention(results: dict[str, Any]) -> None:
    """Print a row per case with the means over layers, narrow enough for any terminal."""
    layers, limit = len(results["shape"]["layers"]), results["read_limit_tb_s"]
    table = Table(
        title=f"decode attention, mean of {layers} layers; read limit {limit:.2f} TB/s",
        caption="in brackets: bound on the speed-up, by bytes",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("case")
    for name in ("leank\nms", "flash\nms", f"flash\n{EIGHT_BIT_CACHE} ms", "TB/s", "of\nlimit"):
        table.add_column(name, justify="right")
    table.add_column("against\nflash", justify="right")
    table.add_column(f"against\nflash {EIGHT_BIT_CACHE}", justify="right")
    for case in results["cases"]:
        table.add_row(*_row(case))
    Console().print(table)


def _row(case: dict[str, Any]) -> list[str]:
    mean, others = case["mean"], ("flash", f"flash_{EIGHT_BIT_CACHE}")
    return [
        f"{case['batch']} x {case['length']:,}\n"
        f"{case['sink']}/{case['recent']}, {case['archive_format']}",
        f"{mean['ms']:.4f}",
        *(f"{case[name]['ms']:.4f}" if name in case else "-" for name in others),
        f"{mean['tb_s']:.2f}",
        f"{mean['share_of_read_limit']:.1%}",
        *(
            f"{mean[f'speedup_{name}']:.2f}x\n({mean[f'bound_{name}']:.2f}x)"
            if name in case
            else "-"
            for name in others
        ),
    ]
