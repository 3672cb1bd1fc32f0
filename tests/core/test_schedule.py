"""Schedules: values by step, the recipe form, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tokenloom import Schedule
from tokenloom.schedule import resolve


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Schedule("linear", 1.0, 0.0, steps=4), [1, 0.75, 0.5, 0.25, 0, 0]),
        (Schedule("linear", 0.0, 2.0, steps=2, delay=2), [0, 0, 0, 1, 2, 2]),
        (Schedule("constant", 0.3, 0.9), [0.3, 0.3, 0.3]),
        (Schedule("cosine", 1.0, 0.0, steps=2), [1, 0.5, 0, 0]),
        (Schedule("exponential", 1.0, 0.01, steps=2), [1, 0.1, 0.01, 0.01]),
        (Schedule("power", -2.0, 2.0, steps=4), [-2, -1.75, -1, 0.25, 2, 2]),
        (Schedule("power", 2.0, 0.0, steps=2, power=3.0), [2, 1.75, 0]),
        (Schedule("cubic", -2.0, 2.0, steps=4), [-2, -0.25, 0, 0.25, 2]),
    ],
)
def test_values_by_step(schedule: Schedule, values: list[float]) -> None:
    assert [schedule.at(i) for i in range(len(values))] == pytest.approx(values)


def test_without_steps_it_ends_with_the_run() -> None:
    s = Schedule("linear", 1.0, 0.0)
    assert [s.at(i, 4) for i in (0, 1, 4)] == [1, 0.75, 0]
    delayed = Schedule("linear", 1.0, 0.0, delay=2)
    assert [delayed.at(i, 4) for i in (0, 2, 3, 4)] == [1, 1, 0.5, 0]


def test_a_run_without_end_needs_steps() -> None:
    with pytest.raises(ValueError, match="length is unknown; give it steps"):
        Schedule("linear", 1.0, 0.0).at(0)
    assert Schedule("constant", 1.0, 0.0).at(5) == 1


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential", "power", "cubic"])
def test_it_never_leaves_its_ends(shape: Any) -> None:
    s = Schedule(shape, 0.5, 0.2, steps=7, delay=3)
    values = [s.at(i) for i in range(20)]
    assert values[0] == 0.5
    assert values[-1] == pytest.approx(0.2)
    assert values == sorted(values, reverse=True)


def test_parse_reads_the_recipe_form() -> None:
    spec = {"schedule": "cosine", "start": 1, "end": 0.1, "steps": 10, "delay": 3}
    assert Schedule.parse(spec) == Schedule("cosine", 1, 0.1, 10, 3)
    assert Schedule.parse({"schedule": "constant", "start": 2.0}).at(9) == 2
    spec = {"schedule": "power", "start": 1, "end": 0, "steps": 4, "power": 3.0}
    assert Schedule.parse(spec) == Schedule("power", 1, 0, 4, power=3.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"schedule": "linaer", "start": 1, "end": 0}, "unknown schedule 'linaer'; known: constant, linear"),
        ({"schedule": "linear", "start": 1, "end": 0, "stop": 3}, r"unknown keys in a schedule: \['stop'\]; known"),
        ({"schedule": "linear", "end": 0}, r"needs the keys \['start'\]"),
        ({"start": 1, "end": 0}, r"needs the keys \['schedule'\]"),
        ({"schedule": "linear", "start": 1}, r"needs the keys \['end'\]"),
        ({"schedule": "linear", "start": 1, "end": 0, "steps": 0}, "steps >= 1"),
        ({"schedule": "linear", "start": 1, "end": 0, "steps": 2.5}, "steps >= 1, an integer, got 2.5"),
        ({"schedule": "linear", "start": 1, "end": 0, "steps": True}, "steps >= 1"),
        ({"schedule": "linear", "start": 1, "end": 0, "delay": -1}, "delay >= 0"),
        ({"schedule": "linear", "start": "1e-3", "end": 0}, "start must be a finite number, got '1e-3'"),
        ({"schedule": "linear", "start": True, "end": 0}, "start must be a finite number"),
        ({"schedule": "linear", "start": 1, "end": math.nan}, "end must be a finite number"),
        ({"schedule": "exponential", "start": 1, "end": 0}, "start and end above zero"),
    ],
)
def test_what_makes_no_sense_is_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.parse(spec)


def test_resolve_and_text() -> None:
    s = Schedule("linear", 1.0, 0.0, steps=4, delay=2)
    assert resolve(s, 4, None) == 0.5
    assert resolve("text", 4, None) == "text"
    assert str(s) == "linear 1 -> 0 over 4 steps after 2"
