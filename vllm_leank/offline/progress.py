"""How far the reading of prompts has come, and how long the rest takes."""

import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import Progress


def reading(prompts: Sequence[Sequence[int]], what: str) -> Iterator[Sequence[int]]:
    """Prompts one after the other, under a progress bar on stderr that counts their tokens.

    After the first one a line says how long the others take, also where no terminal shows the bar.
    """
    console = Console(stderr=True, highlight=False)
    total = sum(len(ids) for ids in prompts)
    begin = time.monotonic()
    # The bar's own guess would forget prompts that took longer than this.
    with Progress(console=console, speed_estimate_period=3600) as bar:
        task = bar.add_task(what, total=total)
        for number, ids in enumerate(prompts):
            yield ids
            bar.advance(task, len(ids))
            if number == 0 and (rest := total - len(ids)):
                seconds = (time.monotonic() - begin) * rest / len(ids)
                console.print(f"{what}: {about(seconds)} more", soft_wrap=True)


def about(seconds: float) -> str:
    """A duration in words, as exact as a guess."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {max(10, round(seconds, -1)):.0f} seconds"
