"""Sides measured in turn, each in a process of its own: A B, B A, A B, ...

A module of this folder describes its table and hands it to the harness:

    TABLE = Table("rollout", "Rollouts", rows, (Metric("tokens_per_second", "tokens/s", better="higher"), PEAK))

    def rows(quick: bool) -> list[Row]:          # one row per configuration, Tokenloom's side first
        return [Row("batch 32", (Side("Tokenloom", "bench.rollout:ours", {"batch": 32}), Side("vLLM", ...)))]

    def ours(turns: Turns, *, batch: int) -> None:   # runs in the side's own process, see `bench.child`
        ...load, warm up...
        for _ in turns:
            turns.report(seconds=..., tokens_per_second=...)

    if __name__ == "__main__":
        main(TABLE)                              # the same flags as `python -m bench.run --only rollout`

Side by side means: both processes are alive through all rounds of a row, and only one works at a time;
a row with `fresh=True` starts each side anew in every round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Self

ROOT = Path(__file__).resolve().parent.parent
RUNS = 5
"""Rounds of a row, unless it says otherwise."""

Measurement = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One competitor: `call` names `module:function`, called with `settings` under the interpreter `python`.

    `requires` are distributions that must be installed there and `needs` a file or folder that must exist, `install`
    says how to get them. `about` is what the page says of it beside its name.
    """

    name: str
    call: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    install: str = ""
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)
    about: str = ""
    needs: Path | None = None


@dataclass(frozen=True)
class Metric:
    """A number of every measurement: its key, column title, unit, and which direction is better.

    `factor` turns the reported number into the unit. With `compare` the page says how many times better ours is.
    """

    key: str
    title: str
    unit: str = ""
    better: Literal["lower", "higher"] = "lower"
    factor: float = 1.0
    compare: bool = True


SECONDS = Metric("seconds", "time", "s")
PEAK = Metric("peak_rss", "peak memory", "GB", factor=1e-9)


@dataclass(frozen=True)
class Target:
    """Wanted of a row: at least `at_least` times better than `peer` in `metric`, or our own value at most `at_most`."""

    metric: str
    peer: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.peer is None) == (self.at_most is None) or (self.peer is None) != (self.at_least is None):
            raise ValueError("a target is either a peer and at_least, or at_most alone")


@dataclass(frozen=True)
class Row:
    """One configuration: its sides, ours first, measured in `runs` rounds (after `fresh` starts, or in one life).

    A `long` row is measured only by `--long`; until then the page keeps what was measured last.
    """

    label: str
    sides: tuple[Side, ...]
    runs: int = RUNS
    fresh: bool = False
    targets: tuple[Target, ...] = ()
    long: bool = False


@dataclass(frozen=True)
class Table:
    """What one module measures. `rows(quick)` are the configurations, small ones for a smoke run.

    `blocks` makes generated parts of the page from the stored results, by marker name: further ones, or another form
    of the table itself. `draw` writes pictures that the page shows.
    """

    name: str
    title: str
    rows: Callable[[bool], list[Row]]
    metrics: tuple[Metric, ...]
    blocks: Callable[[Mapping[str, Any]], Mapping[str, str]] | None = None
    draw: Callable[[Mapping[str, Any]], None] | None = None


class SideFailed(RuntimeError):
    """A side's process ended without an answer; the message holds the end of its output."""


class SideProcess:
    """A side's process, set up when entered and alive until left; `measure` gives it one turn.

    `facts` are the versions and the number of threads that it reported.
    """

    def __init__(self, side: Side) -> None:
        self.side = side
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [self.side.python, "-m", "bench.child", self.side.call, json.dumps(dict(self.side.settings))],
            cwd=ROOT,
            env=os.environ | dict(self.side.environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            self.facts = self._answer()
        except BaseException:
            self.__exit__()
            raise
        return self

    def measure(self) -> Measurement:
        """One measurement.

        Raises:
            SideFailed: when the process ends instead.
        """
        with suppress(BrokenPipeError):  # then there is no answer either, and the log says why
            self._requests.write(b"go\n")
            self._requests.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            end = self._log.read().decode(errors="replace").strip().splitlines()[-15:] or ["it printed nothing"]
            raise SideFailed("\n".join([f"{self.side.name} ended with code {code}: {end[-1]}", *end]))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __exit__(self, *_: object) -> None:
        with suppress(BrokenPipeError):
            self._requests.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()

    @property
    def _requests(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin


@dataclass
class Measured:
    """The measurements of one side, in order of rounds, with what its process said of itself."""

    measurements: list[Measurement] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def alternate(
    sides: Sequence[Side], runs: int = RUNS, *, fresh: bool = False, report: Callable[[int, Side], None] | None = None
) -> dict[str, Measured]:
    """`runs` measurements of every side, in turn, the order reversed every round; by the side's name.

    `report(round, side)` is called before each measurement.

    Raises:
        SideFailed: when a side's process ends early.
    """
    names = [side.name for side in sides]
    if len(set(names)) != len(names):
        raise ValueError(f"two sides of a row have the same name: {names}")
    results = {name: Measured() for name in names}

    def turn(process: SideProcess) -> None:
        mine = results[process.side.name]
        mine.measurements.append(process.measure())
        mine.facts = process.facts

    with ExitStack() as alive:
        processes = {} if fresh else {s.name: alive.enter_context(SideProcess(s)) for s in sides}
        for number, side in order(sides, runs):
            if report is not None:
                report(number, side)
            if fresh:
                with SideProcess(side) as process:
                    turn(process)
            else:
                turn(processes[side.name])
    return results


def order(sides: Sequence[Side], runs: int) -> Iterator[tuple[int, Side]]:
    """Round and side of each measurement: A B, B A, A B, ..."""
    for number in range(runs):
        for side in sides if number % 2 == 0 else reversed(sides):
            yield number, side


def missing(side: Side) -> str:
    """Why a side cannot run here ("" when it can), with the remedy."""
    if not Path(side.python).is_file():
        return f"{side.name}: there is no interpreter {side.python}; {side.install}".rstrip("; ")
    if side.needs is not None and not side.needs.exists():
        return f"{side.name}: {side.install}"
    code = (
        "import sys; from importlib.metadata import distributions as d; "
        "have = {x.name.lower().replace('_', '-') for x in d() if x.name}; "
        "print(' '.join(p for p in sys.argv[1:] if p not in have))"
    )
    done = subprocess.run([side.python, "-c", code, *side.requires], capture_output=True, text=True, check=False)
    absent = done.stdout.split() if done.returncode == 0 else list(side.requires)
    return f"{side.name}: {', '.join(absent)} not installed; {side.install}".rstrip("; ") if absent else ""


def main(table: Table) -> None:
    """The command line of a table's own module."""
    from bench.run import run

    run([table.name])
