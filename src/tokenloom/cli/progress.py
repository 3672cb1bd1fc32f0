"""What a run shows while it runs: a line for each step, and on a terminal a live line below them."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tokenloom.cli.clock import TimeLeft, clock
from tokenloom.cli.console import interactive
from tokenloom.report.series import Series
from tokenloom.report.terminal import sparkline

if TYPE_CHECKING:
    from tokenloom.train.recipe import Recipe

STAGES = {"rollout": "sampling", "update": "updating", "evaluate": "evaluating"}
UNITS = {"rollout": "responses", "update": "responses learned from", "evaluate": "responses"}


def progress_observer(recipe: Recipe, out: Console, *, quiet: bool = False) -> Lines:
    """The observer that suits the console: a live display, plain lines, or silence."""
    if quiet:
        return Lines(recipe, out, quiet=True)
    return LiveLines(recipe, out) if interactive(out) else Lines(recipe, out)


class Lines:
    """One compact line for each step and each evaluation: for pipes, logs and dumb terminals."""

    def __init__(self, recipe: Recipe, out: Console, *, quiet: bool = False) -> None:
        self.recipe, self.out, self.quiet = recipe, out, quiet
        self.left = TimeLeft(recipe.train)
        self.evaluating = False

    def message(self, text: str) -> None:
        """Print what is being done."""
        self._print(Text(text, style="dim"))

    def progress(self, stage: str, done: int, total: int, tokens: int) -> None:
        """Only keep time: a log has no place for what is soon out of date."""
        if stage == "evaluate" and not self.evaluating:
            self.evaluating = True
            self.left.mark()

    def step(self, record: dict[str, Any], timing: dict[str, Any], total_steps: int) -> None:
        """Print the step's numbers."""
        self.left.step(record["step"], float(timing["seconds"]))
        self._print(step_line(record, timing, total_steps, self._tail()))

    def evaluation(self, record: dict[str, Any]) -> None:
        """Print the held-out accuracies."""
        self.left.evaluation(record["step"], int(record.get("samples", 0)))
        self.evaluating = False
        self._print(evaluation_line(record))

    def close(self) -> None:
        """Nothing is held."""

    def _tail(self) -> str:
        left = self.left.seconds()
        return "" if left is None else f"left {clock(left)}"

    def _print(self, text: Text) -> None:
        if not self.quiet:
            self.out.print(text, soft_wrap=True)


class LiveLines(Lines):
    """The same lines, and below them where the run is, redrawn a few times a second."""

    def __init__(self, recipe: Recipe, out: Console) -> None:
        super().__init__(recipe, out)
        self.started = time.monotonic()
        self.done, self.total = 0, recipe.train.steps
        self.stage, self.rows, self.of, self.tokens = "", 0, 0, 0
        self.stage_started = self.started
        self.curves: dict[str, deque[float]] = {n: deque(maxlen=400) for n in ("reward", "accuracy", "entropy")}
        self._live: Live | None = None

    def message(self, text: str) -> None:
        """Print what is being done, and show that it takes its time."""
        super().message(text)
        self._enter(text.partition(":")[0], 0, 0, 0)

    def progress(self, stage: str, done: int, total: int, tokens: int) -> None:
        """Show how far the stage is."""
        super().progress(stage, done, total, tokens)
        self._enter(stage, done, total, tokens)

    def step(self, record: dict[str, Any], timing: dict[str, Any], total_steps: int) -> None:
        """Print the step's numbers and move the bar."""
        self.done, self.total = int(record["step"]), total_steps
        for name, values in self.curves.items():
            if isinstance(record.get(name), float):
                values.append(record[name])
        super().step(record, timing, total_steps)
        self._enter("", 0, 0, 0)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Print the held-out accuracies."""
        super().evaluation(record)
        # A resumed run says here, if not in a step before, how far it is.
        self.done = int(record["step"])
        self._enter("", 0, 0, 0)

    def close(self) -> None:
        """Take the live lines away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _enter(self, stage: str, rows: int, of: int, tokens: int) -> None:
        if stage != self.stage or rows < self.rows:
            self.stage, self.stage_started = stage, time.monotonic()
        self.rows, self.of, self.tokens = rows, of, tokens
        if self._live is None:
            self._live = Live(self, console=self.out, refresh_per_second=4, transient=True)
            self._live.start()

    def _tail(self) -> str:
        return ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The live lines: the run, the stage, and the curves so far."""
        now = time.monotonic()
        lines: list[Any] = [Text(), self._bar(self.done, self.total, self._run_text(now))]
        if self.stage in STAGES:
            lines.append(self._bar(self.rows, self.of, self._stage_text(now)))
        else:
            lines.append(Text(f"{self.stage or 'next step'} … {clock(now - self.stage_started)}", style="dim"))
        if len(self.curves["reward"]) > 1:
            curves = Text()
            for name, values in self.curves.items():
                if len(values) > 1:
                    curves.append(f"{name} ", style="dim")
                    curves.append_text(sparkline(Series(list(range(len(values))), list(values)), console, 16))
                    curves.append("   ")
            lines.append(curves)
        yield Group(*lines)

    def _run_text(self, now: float) -> Text:
        text = Text(f"{self.done} of {self.total} steps · {clock(now - self.started)} elapsed")
        left = self.left.seconds()
        return text if left is None else text.append(f" · {clock(left)} left", style="bold")

    def _stage_text(self, now: float) -> Text:
        text = Text(f"{STAGES[self.stage]}: {self.rows} of {self.of} {UNITS[self.stage]}")
        seconds = now - self.stage_started
        if self.tokens:
            text.append(f" · {self.tokens:,} tokens")
            text.append(f" · {self.tokens / seconds:,.0f} tok/s" if seconds > 0.5 else "")
        return text

    def _bar(self, done: int, total: int, text: Text) -> Table:
        row = Table.grid(padding=(0, 2))
        row.add_column(width=24)
        row.add_column()
        row.add_row(ProgressBar(total=max(total, 1), completed=done, width=24), text)
        return row


def step_line(record: dict[str, Any], timing: dict[str, Any], total: int, tail: str = "") -> Text:
    """One step in under 80 characters; what is not a number stands out."""
    text = Text(f"step {record['step']:>{len(str(total))}}/{total}")
    shown = (
        ("reward", _number(record.get("reward"), "{:.3f}")),
        ("accuracy", _number(record.get("accuracy"), "{:.0%}")),
        ("entropy", _number(record.get("entropy"), "{:.2f}")),
        ("length", _number(record.get("response_length"), "{:.1f}")),
        ("", _number(timing.get("tokens_per_second"), "{:,.0f} tok/s")),
        ("", _number(timing.get("seconds"), "{:.1f} s")),
    )
    for name, value in shown:
        if value is not None:
            text.append(f"  {name}{' ' if name else ''}", style="dim")
            text.append(value, style="red" if "nan" in value or "inf" in value else "")
    if record.get("skipped_updates"):
        text.append("  update skipped", style="red")
    return text.append(f"  {tail}", style="dim") if tail else text


def evaluation_line(record: dict[str, Any]) -> Text:
    """Held-out accuracies of one evaluation."""
    text = Text("held-out ", style="bold cyan")
    text.append("before training" if record["step"] == 0 else f"after step {record['step']}")
    text.append(f"  greedy {record['greedy']:.1%}", style="bold")
    if "sampled" in record:
        text.append(f"  sampled {record['sampled']:.1%}", style="bold")
    each = f", {record['samples']} samples each" if record.get("samples") else ""
    return text.append(f"  ({record['problems']} problems{each})", style="dim")


def _number(value: Any, form: str) -> str | None:
    return form.format(value) if isinstance(value, int | float) else None
