"""Schedules: hyperparameters that change over training steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

Shape = Literal["constant", "linear", "cosine", "exponential", "power", "cubic"]


@dataclass(frozen=True)
class Schedule:
    """A float that moves from `start` to `end` over `steps` steps after `delay` steps, then stays.

    `steps=None` means the rest of the run after the delay. With x the progress in [0, 1], "power" moves like
    x ** `power`, "cubic" like (1 + (2 x - 1)^3) / 2: fast at both ends, slow in the middle. In a recipe:
    `{schedule: linear, start: 1.0, end: 0.0, steps: 100}`.

    >>> Schedule("linear", 1.0, 0.0, steps=4).at(1, 100)
    0.75
    """

    shape: Shape
    start: float
    end: float
    steps: int | None = None
    delay: int = 0
    power: float = 2.0

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ValueError(f"unknown schedule {self.shape!r}; known: {', '.join(get_args(Shape))}")
        for name in ("start", "end", "power"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"a schedule's {name} must be a finite number, got {value!r}")
        for name, least in (("steps", 1), ("delay", 0)):
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"a schedule needs {name} >= {least}, an integer, got {value!r}")
        if self.power <= 0:
            raise ValueError(f"a schedule's power must be above zero, got {self.power}")
        if self.shape == "exponential" and not (self.start > 0 and self.end > 0):
            raise ValueError("an exponential schedule needs start and end above zero")

    def at(self, step: int, total_steps: int | None = None) -> float:
        """The value at `step` (0-based) of a run of `total_steps`.

        Raises:
            ValueError: when neither the schedule nor the run has a length.
        """
        if self.shape == "constant":
            return self.start
        if self.steps is None and total_steps is None:
            raise ValueError(f"the schedule '{self}' spans the whole run, whose length is unknown; give it steps")
        steps = self.steps or max((total_steps or 1) - self.delay, 1)
        x = min(max(step - self.delay, 0) / steps, 1.0)
        if self.shape == "exponential":
            return float(self.start * (self.end / self.start) ** x)
        if self.shape == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        if self.shape == "power":
            x = x**self.power
        if self.shape == "cubic":
            x = (1 + (2 * x - 1) ** 3) / 2
        return self.start + (self.end - self.start) * x

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> Self:
        """Read the recipe form, a mapping with the key `schedule`.

        Raises:
            ValueError: on unknown or missing keys.
        """
        known = {"schedule", "start", "end", "steps", "delay", "power"}
        if unknown := set(value) - known:
            raise ValueError(f"unknown keys in a schedule: {sorted(unknown)}; known: {sorted(known)}")
        needed = {"schedule", "start"} | (set() if value.get("schedule") == "constant" else {"end"})
        if missing := needed - set(value):
            raise ValueError(f"a schedule needs the keys {sorted(missing)}")
        rest = {k: v for k, v in value.items() if k != "schedule"}
        return cls(shape=value["schedule"], **({"end": value["start"]} | rest))

    def __str__(self) -> str:
        span = f" over {self.steps} steps" if self.steps else ""
        span += f" after {self.delay}" if self.delay else ""
        return f"{self.shape} {self.start:g} -> {self.end:g}{span}"


def resolve(value: Any, step: int, total_steps: int | None) -> Any:
    """`value` itself, or its value at `step` when it is a schedule."""
    return value.at(step, total_steps) if isinstance(value, Schedule) else value
