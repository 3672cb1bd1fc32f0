"""A live line for one stage: how many responses are done, how fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text


@contextmanager
def stage_progress(out: Console, name: str, *, show: bool) -> Iterator[Callable[[int, int, int], None]]:
    """A function of (done, total, tokens) that keeps a line up to date while the context is open."""
    if not show:
        yield lambda done, total, tokens: None
        return
    started = time.monotonic()
    text = Text(f"{name} …", style="dim")
    # Standard output may be a pipe that is written to meanwhile.
    with Live(text, console=out, refresh_per_second=4, transient=True, redirect_stdout=False):

        def report(done: int, total: int, tokens: int) -> None:
            seconds = max(time.monotonic() - started, 1e-9)
            text.plain = f"{name}: {done} of {total} responses · {tokens:,} tokens · {tokens / seconds:,.0f} tok/s"

        yield report
