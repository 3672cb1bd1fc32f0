"""`tokenloom report` and `tokenloom compare`: looking at runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenloom.cli.console import console
from tokenloom.cli.guard import guarded


@guarded
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; default RUN/report.html.")] = None,
) -> None:
    """Show a run: a summary here, and everything in one HTML file that needs no network.

    Examples:
      tokenloom report runs/quickstart-001
      tokenloom report runs/quickstart-001 --out quickstart.html
    """
    from tokenloom.report import write_report
    from tokenloom.report.terminal import print_summary

    screen = console()
    path = write_report(run, out)
    print_summary(run, screen)
    screen.print(f"report: {path}", soft_wrap=True)


@guarded
def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN", help="Another.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write one HTML file with the curves of both.")
    ] = None,
) -> None:
    """Put two runs side by side: final numbers, their differences, and where the recipes differ.

    Examples:
      tokenloom compare runs/quickstart-001 runs/quickstart-002
      tokenloom compare runs/quickstart-001 runs/quickstart-002 --out compare.html
    """
    from tokenloom.report import compare_report
    from tokenloom.report.terminal import print_compare

    screen = console()
    print_compare(run_a, run_b, screen)
    if out is not None:
        screen.print(f"comparison: {compare_report([run_a, run_b], out)}", soft_wrap=True)
