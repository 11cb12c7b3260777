"""Finds the steady state of an engine: full of requests, all decoding, none in prefill."""

from dataclasses import dataclass, field

import numpy as np

FEWEST_STEPS = 16
"""Steps of a full engine that are enough for figures."""


@dataclass(frozen=True)
class Step:
    """What an engine reports of one step.

    Attributes:
        time: seconds, of a monotonic clock, when its output arrived.
        running: requests that run.
        waiting: requests that wait for room.
        prompt_tokens: tokens of the prompts that this step completed.
        new_tokens: tokens that it generated.
        preempted: requests that lost their room.
        latencies: seconds since the token before, of each generated token that has one.
    """

    time: float
    running: int
    waiting: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    preempted: int = 0
    latencies: tuple[float, ...] = ()

    @property
    def is_decode(self) -> bool:
        """Whether every running request got a token, and none of them its first."""
        return self.new_tokens == self.running > 0 and not self.prompt_tokens


@dataclass
class Stretch:
    """Consecutive decode steps of the same number of requests.

    Attributes:
        begin: when the step before it ended.
        steps: its steps.
    """

    begin: float
    steps: list[Step] = field(default_factory=list)

    @property
    def running(self) -> int:
        """Requests that decode; 0 without steps."""
        return self.steps[-1].running if self.steps else 0

    @property
    def is_full(self) -> bool:
        """Whether requests wait for room, and there are enough steps.

        They waited in all of them: who gets room computes a prompt, which ends the stretch.
        """
        return len(self.steps) >= FEWEST_STEPS and self.steps[-1].waiting > 0

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.steps[-1].time - self.begin

    @property
    def tokens_per_s(self) -> float:
        """Tokens generated per second."""
        return sum(step.new_tokens for step in self.steps) / self.seconds

    def latency_ms(self, percentile: float) -> float:
        """A percentile of the time between two tokens of a request."""
        latencies = [latency for step in self.steps for latency in step.latencies]
        return float(np.percentile(latencies, percentile)) * 1e3


class SteadyState:
    """Watches steps as they come.

    Attributes:
        current: the stretch that the last step belongs to, empty after any other step.
        best: of a full engine the stretch with most requests, and of these the longest; while
            there is none, the longest of all. An engine may be full for few steps only, as its
            requests outgrow their room: who is left then decodes for longer, but is not what the
            engine can do.
        peak: most requests that ever ran.
        preempted: preemptions so far.
    """

    def __init__(self) -> None:
        self.current = self.best = Stretch(0.0)
        self.peak = self.preempted = 0
        self._last, self._is_emptier = 0.0, False

    def settled(self, steps: int) -> bool:
        """Whether there are so many steady steps, or the engine was full and will not be again."""
        return len(self.current.steps) >= steps or (self.best.is_full and self._is_emptier)

    def add(self, step: Step) -> None:
        """Take the next step."""
        if not step.is_decode or step.running != self.current.running:
            self.current = Stretch(self._last)
        if step.is_decode:
            self.current.steps.append(step)
        if self._rank(self.current) > self._rank(self.best):
            self.best = self.current
        self.peak = max(self.peak, step.running)
        self.preempted += step.preempted
        self._last, self._is_emptier = step.time, step.preempted > 0 or not step.waiting

    @staticmethod
    def _rank(stretch: Stretch) -> tuple[int, int, int]:
        most = stretch.running if stretch.is_full else 0
        return most, len(stretch.steps), stretch.running
