"""Times as people read them, and how much is left of a run."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenloom.train.config import TrainConfig


def clock(seconds: float) -> str:
    """1:04, or 2:01:07 from an hour on."""
    total = round(max(seconds, 0))
    hours, rest = divmod(total, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TimeLeft:
    """Seconds until the last evaluation, from the steps and evaluations seen so far.

    An evaluation of n samples costs 1 + n responses a problem, so one seen with another number says
    what the next will take.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._done = 0
        self._steps: deque[float] = deque(maxlen=10)
        self._per_response: float | None = None
        self._since = time.monotonic()

    def mark(self) -> None:
        """Something began now."""
        self._since = time.monotonic()

    def step(self, step: int, seconds: float) -> None:
        """Step number `step` took so long."""
        self._done = step
        self._steps.append(seconds)
        self.mark()

    def evaluation(self, step: int, samples: int) -> None:
        """An evaluation ended that began at the last mark."""
        self._done = step
        self._per_response = (time.monotonic() - self._since) / (1 + samples)
        self.mark()

    def seconds(self) -> float | None:
        """What is left, None before the first step."""
        if not self._steps:
            return None
        left = (self._config.steps - self._done) * sum(self._steps) / len(self._steps)
        return left + (self._per_response or 0.0) * self._responses_left()

    def _responses_left(self) -> int:
        config = self._config.eval
        between = 0
        if config.every:
            last = self._config.steps - 1  # the evaluation after the last step is the final one
            between = max(last // config.every - self._done // config.every, 0)
        final = config.samples if config.final_samples is None else config.final_samples
        return between * (1 + config.samples) + (1 + final if self._done < self._config.steps else 0)
