"""Where the command line writes: never markup, color and live displays only where they belong."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 160


def console(*, stderr: bool = False) -> Console:
    """A console on the current standard stream. Text is printed as it is: no markup, no guessed colors.

    Rich itself honors NO_COLOR and leaves out colors in pipes, where lines are wide enough not to break.
    """
    out = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out = Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=PIPE_WIDTH)
    return out


def interactive(out: Console) -> bool:
    """Whether lines may be redrawn: a terminal that can, and no CI log."""
    return out.is_terminal and not out.is_dumb_terminal and not os.environ.get("CI")


def can_ask(out: Console) -> bool:
    """Whether a person sits at both ends."""
    return interactive(out) and sys.stdin is not None and sys.stdin.isatty()


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines, headings dim; columns named in `right` are flush right."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


def pairs(out: Console, rows: list[tuple[str, str | Text]], indent: int = 2, style: str = "dim") -> None:
    """Lines "name  value", names in one column, long values continued under themselves."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(width=indent - 2 if indent > 2 else 0)
    made.add_column(style=style, no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row("", name, value)
    out.print(made)


def visible(text: str) -> str:
    """Model output that is safe on a terminal: lines stay lines, other control characters become `\\uXXXX`."""
    from tokenloom.report import text as report_text

    return report_text.visible(text)


def count(number: float) -> str:
    """A large number in at most four digits: 134.5 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f}"


def program() -> str:
    """How this program was called, in a form that works again when pasted."""
    called = Path(sys.argv[0] or "tokenloom")
    if called.name == "__main__.py":
        return "python -m tokenloom"
    found = shutil.which("tokenloom")
    if not called.name.startswith("tokenloom") or (found and Path(found).resolve() == called.resolve()):
        return "tokenloom"
    try:
        return str(called.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(called)


def quiet_libraries(out: Console, *, warnings_only: bool = False) -> None:
    """Silence progress bars and advice of libraries; keep Tokenloom's own log lines, dim, on `out`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not interactive(out):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as advice

    advice.disable_progress_bar()  # type: ignore[no-untyped-call]  # not annotated there
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logger = logging.getLogger("tokenloom")
    for old in [h for h in logger.handlers if isinstance(h, LogLines)]:
        logger.removeHandler(old)
    logger.addHandler(LogLines(out))
    logger.setLevel(logging.WARNING if warnings_only else logging.INFO)


class LogLines(logging.Handler):
    """Log records as lines of a console, above a live display if there is one; equal ones once."""

    def __init__(self, out: Console) -> None:
        super().__init__(logging.INFO)
        self.out = out
        self.seen: set[str] = set()
        # The trainer hands the same lines to its observers.
        self.addFilter(lambda record: record.name != "tokenloom.tasks.verify")

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; a warning stands out."""
        try:
            text = record.getMessage()
        except (TypeError, ValueError):
            return
        if text in self.seen:
            return
        self.seen.add(text)
        warning = record.levelno >= logging.WARNING
        self.out.print(("warning: " if warning else "") + text, style="yellow" if warning else "dim")
