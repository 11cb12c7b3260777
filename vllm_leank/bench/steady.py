"""Finds the steady state of an engine: full of requests, all decoding, none in prefill."""

from dataclasses import dataclass, field

import numpy as np


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
        longest: the longest so far; of equally long ones that with more requests.
        peak: most requests that ever ran.
        preempted: preemptions so far.
    """

    def __init__(self) -> None:
        self.current = self.longest = Stretch(0.0)
        self.peak = self.preempted = 0
        self._last = 0.0

    def add(self, step: Step) -> None:
        """Take the next step."""
        if not step.is_decode or step.running != self.current.running:
            self.current = Stretch(self._last)
        if step.is_decode:
            self.current.steps.append(step)
        if self._rank(self.current) > self._rank(self.longest):
            self.longest = self.current
        self.peak = max(self.peak, step.running)
        self.preempted += step.preempted
        self._last = step.time

    @staticmethod
    def _rank(stretch: Stretch) -> tuple[int, int]:
        return len(stretch.steps), stretch.running
