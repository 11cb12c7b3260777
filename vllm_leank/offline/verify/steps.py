"""What is being done, how far it has come, and how much time is left."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Steps:
    """A clock, and a progress bar on stderr with one line for what is being done.

    Where no terminal shows the bar, every beginning is a line.
    """

    def __init__(self, seconds: float):
        self.console = Console(stderr=True, highlight=False)
        self.seconds = seconds
        self._start = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "Steps":
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds that may still be taken."""
        return self.seconds - self.spent

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, soft_wrap=True, markup=False)

    def begin(self, what: str, total: float) -> None:
        """Something else is being done from now on, of which `total` is all."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=total)
        if not self.console.is_terminal:
            self.say(what)

    def tell(self, what: str) -> None:
        """The same goes on, with other words."""
        if self._task is not None:
            self._bar.update(self._task, description=what)

    def advance(self, amount: float = 1) -> None:
        """So much more has been done."""
        if self._task is not None:
            self._bar.advance(self._task, amount)


def duration(seconds: float) -> str:
    """A time in words, as exact as a guess."""
    if seconds < 100:
        return f"{max(5, 5 * round(seconds / 5))} seconds"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 100 else f"{minutes / 60:.1f} hours"
