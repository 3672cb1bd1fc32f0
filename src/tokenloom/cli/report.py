"""`tokenloom report`: a run or a laboratory's results as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenloom.cli.console import console
from tokenloom.cli.guard import UsageError, guarded


@guarded
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, finished or not, or one of `tokenloom lab`.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; default RUN/report.html.")] = None,
    compare: Annotated[
        str, typer.Option(help="Presets to ask what they would do with the dumped responses, separated by commas.")
    ] = "",
) -> None:
    """Show a run: a summary here, and everything in one HTML file that needs no network.

    Examples:
      tokenloom report runs/quickstart-001
      tokenloom report runs/quickstart-001 --out quickstart.html
      tokenloom report runs/quickstart-001 --compare dapo,gspo
      tokenloom report runs/lab
    """
    screen = console()
    names = [name.strip() for name in compare.split(",") if name.strip()]
    if _is_lab(run):
        if names:
            raise UsageError("--compare asks about a run's responses; a lab folder compares its methods already")
        from tokenloom.lab.bench import redraw

        screen.print(f"leaderboard: {redraw(run, out)}", soft_wrap=True)
        return
    from tokenloom.report import write_report
    from tokenloom.report.terminal import print_summary

    path = write_report(run, out, compare=names)
    print_summary(run, screen)
    screen.print(f"report: {path}", soft_wrap=True)


def _is_lab(folder: Path) -> bool:
    return (folder / "results.json").is_file() and (folder / "cells").is_dir()
