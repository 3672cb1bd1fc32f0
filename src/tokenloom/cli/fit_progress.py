"""How far the fitting of a model is: a bar with tokens a second and the loss, or now and then a line in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tokenloom.cli.clock import clock
from tokenloom.cli.console import interactive

_LOG_SECONDS = 20.0


class FitProgress:
    """Call it with a stage, what is done and in all, the tokens of the stage that this call took, and the loss."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._live: Live | None = None
        self._stage, self._began, self._first, self._shown = "", 0.0, 0, 0.0

    def __call__(self, stage: str, done: int, of: int, tokens: int, loss: float | None) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._first, self._shown = stage, now, done, now
        seconds = now - self._began
        text = Text(f"{stage}: {done:,} of {of:,}")
        if tokens and seconds > 0.5:
            text.append(f" · {tokens / seconds:,.0f} tok/s")
        if loss is not None:
            text.append(f" · loss {loss:.3f}")
        if done > self._first and done < of:
            text.append(f" · {clock(seconds / (done - self._first) * (of - done))} left", style="bold")
        if interactive(self._out):
            self._draw(done, of, text)
        elif done >= of or now - self._shown > _LOG_SECONDS:
            self._out.print(text, style="dim", soft_wrap=True)
            self._shown = now

    def _draw(self, done: int, of: int, text: Text) -> None:
        row = Table.grid(padding=(0, 2))
        row.add_column(width=24)
        row.add_column()
        row.add_row(ProgressBar(total=max(of, 1), completed=done, width=24), text)
        if self._live is None:
            self._live = Live(Group(row), console=self._out, refresh_per_second=4, transient=True)
            self._live.start()
        self._live.update(Group(row))

    def close(self) -> None:
        """Take the bar away."""
        if self._live is not None:
            self._live.stop()
            self._live = None


@contextmanager
def fit_progress(out: Console) -> Iterator[FitProgress]:
    """A progress display that is gone afterwards, whatever happens."""
    shown = FitProgress(out)
    try:
        yield shown
    finally:
        shown.close()
