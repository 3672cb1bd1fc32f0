"""The command line. Importing it is quick: commands import what they need when they run."""

from __future__ import annotations

import contextlib
import os
import sys

MISSING = "the command line needs more than the core: python -m pip install 'tokenloom[train]'"


def main() -> None:
    """Run the `tokenloom` command with the arguments of this process."""
    for stream in (sys.stdout, sys.stderr):
        # An old code page shows "?" for what it lacks; that is better than an end in the middle of a run.
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # streams may be replaced
    try:
        from tokenloom.cli.app import app
    except ModuleNotFoundError as error:
        if error.name in ("typer", "rich"):
            sys.exit(f"error: {MISSING} ({error.name} is missing)")
        raise
    try:
        app(prog_name=_name())
    except BrokenPipeError:
        # The reader of a pipe left; nothing more can be said to it, and Python must not try at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _name() -> str:
    return "python -m tokenloom" if sys.argv and sys.argv[0].endswith("__main__.py") else "tokenloom"
