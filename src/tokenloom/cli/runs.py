"""`tokenloom compare`: two runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenloom.cli.console import console
from tokenloom.cli.guard import guarded


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
