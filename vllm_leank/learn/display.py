"""Shows how a run gets on: a bar in a terminal, a line now and then elsewhere."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from vllm_leank.learn.checks import Checks
from vllm_leank.learn.stages import Progress

SMOOTH = 20
"""Steps whose mean loss is shown: samples differ."""
LINES = 20
"""Lines per stage where there is no terminal."""


class Display:
    """Progress of both stages on stderr; silent where `shown` is False."""

    def __init__(self, shown: bool = True):
        self.console = Console(stderr=True, quiet=not shown)
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def begin(self, name: str, steps: int, progress: Progress) -> None:
        """A stage of so many steps begins, or goes on."""
        self.name, self.steps, self.held_out = name, steps, ""
        self.task = self.bars.add_task(name, total=steps, completed=progress.step, state="")
        if progress.step:
            self.console.print(f"{name}: goes on after step {progress.step} of {steps}")

    def step(self, progress: Progress) -> None:
        """A step of the stage is done."""
        recent = progress.losses[-SMOOTH:]
        state = f"loss {sum(recent) / len(recent):.4f}, mean factor {progress.means[-1]:.3f}"
        state += self.held_out
        self.bars.update(self.task, completed=progress.step, state=state)
        every = max(1, self.steps // LINES)
        if not self.console.is_terminal and progress.step % every == 0:
            self.console.print(f"{self.name}: step {progress.step} of {self.steps}, {state}")

    def check(self, checks: Checks) -> None:
        """The stage's mask was judged after its last step, or before its first."""
        now, before = checks.losses[-1], checks.losses[0]
        self.held_out = f", held out {now:.4g} ({before:.4g} before)"
        when = f"step {checks.steps[-1]}" if checks.steps[-1] else "before learning"
        if not self.console.is_terminal:
            self.console.print(f"{self.name}: {when}, loss on held-out samples {now:.4g}")

    def note(self, text: str | None) -> None:
        """Print a line, if there is one."""
        if text is not None:
            self.console.print(text)
