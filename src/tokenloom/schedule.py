"""Schedules: hyperparameters that change over training steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

Shape = Literal["constant", "linear", "cosine", "exponential"]


@dataclass(frozen=True)
class Schedule:
    """A float that moves from `start` to `end` over `steps` steps after `delay` steps, then stays.

    `steps=None` means the whole run. In a recipe: `{schedule: linear, start: 1.0, end: 0.0, steps: 100}`.

    >>> Schedule("linear", 1.0, 0.0, steps=4).at(1, 100)
    0.75
    """

    shape: Shape
    start: float
    end: float
    steps: int | None = None
    delay: int = 0

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ValueError(f"unknown schedule {self.shape!r}; known: {', '.join(get_args(Shape))}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"a schedule needs steps >= 1, got {self.steps}")
        if self.shape == "exponential" and not (self.start > 0 and self.end > 0):
            raise ValueError("an exponential schedule needs start and end above zero")

    def at(self, step: int, total_steps: int | None = None) -> float:
        """The value at `step` (0-based) of a run of `total_steps`."""
        steps = self.steps or total_steps or 1
        x = min(max(step - self.delay, 0) / steps, 1.0)
        if self.shape == "constant":
            return self.start
        if self.shape == "exponential":
            return float(self.start * (self.end / self.start) ** x)
        if self.shape == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        return self.start + (self.end - self.start) * x

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> Self:
        """Read the recipe form, a mapping with the key `schedule`.

        Raises:
            ValueError: on unknown or missing keys.
        """
        known = {"schedule", "start", "end", "steps", "delay"}
        if unknown := set(value) - known:
            raise ValueError(f"unknown keys in a schedule: {sorted(unknown)}; known: {sorted(known)}")
        if missing := {"schedule", "start"} - set(value):
            raise ValueError(f"a schedule needs the keys {sorted(missing)}")
        rest = {k: v for k, v in value.items() if k != "schedule"}
        return cls(shape=value["schedule"], **({"end": value["start"]} | rest))

    def __str__(self) -> str:
        span = f" over {self.steps} steps" if self.steps else ""
        return f"{self.shape} {self.start:g} -> {self.end:g}{span}"


def resolve(value: Any, step: int, total_steps: int | None) -> Any:
    """`value` itself, or its value at `step` when it is a schedule."""
    return value.at(step, total_steps) if isinstance(value, Schedule) else value
