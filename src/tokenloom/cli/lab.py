"""`tokenloom lab`: methods against exact ground truth."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tokenloom.cli.clock import clock
from tokenloom.cli.console import console, interactive, program, table
from tokenloom.cli.guard import FAILURE, UsageError, guarded

if TYPE_CHECKING:
    from tokenloom.lab.results import Figure

SHOWN = ("credit", "mean_credit", "cosine", "bias", "noise", "samples", "final", "entropy", "milliseconds")


@guarded
def lab(
    methods: Annotated[
        str, typer.Option(help="Presets by slug or import path, separated by commas; default all, and the yardstick.")
    ] = "",
    families: Annotated[str, typer.Option(help="Task families, separated by commas; default all.")] = "",
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Tasks and samples drawn anew; default 5, with --quick 1.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few batches, short learning: a look, not a measurement.")
    ] = False,
    policy: Annotated[
        Literal["auto", "transformer"],
        typer.Option(help="auto: tables, and a tiny transformer for methods that read hidden states or attention."),
    ] = "auto",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for results; what it holds is not computed again.")
    ] = Path("runs/lab"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes, one thread each; default one per core.")
    ] = None,
    show_families: Annotated[bool, typer.Option("--list", help="List the task families and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")] = False,
) -> None:
    """Measure methods on token tasks whose values and gradient are known exactly.

    A task is small enough to enumerate: every response, its reward and its probability. For each method the lab
    compares the credit of each token with its exact advantage and the mean gradient with the exact one, counts the
    samples until the task is learned, and draws a leaderboard. Every cell (method, family, seed) is kept in --out:
    an interrupted run goes on where it was, and only what has changed is computed anew.

    Examples:
      tokenloom lab --quick
      tokenloom lab --methods grpo,rloo,dapo --families critical-token,long-right
      tokenloom lab --methods my_methods.py:my_preset,grpo --out runs/mine
      tokenloom lab --list
    """
    from tokenloom.lab import bench
    from tokenloom.lab import families as known

    screen = console(stderr=as_json)
    if show_families:
        listed = table("family", "what it isolates")
        for family in known().values():
            listed.add_row(family.name, family.claim)
        screen.print(listed)
        return
    plan = bench.Plan(_names(methods), _names(families), seeds or (1 if quick else 5), quick, policy)
    try:
        cells = plan.cells()
    except ValueError as error:
        raise UsageError(str(error)) from None
    with _progress(screen, len(cells)) as report:
        summary = bench.run_lab(plan, out, workers=workers, report=report)
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _print(summary, plan.seeds, screen)
    screen.print(f"leaderboard: {out / 'index.html'}", soft_wrap=True)
    screen.print(f"numbers: {out / 'results.json'}", soft_wrap=True)
    if any(p["status"] == "failed" for p in summary["not_run"]):
        raise typer.Exit(FAILURE)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@contextmanager
def _progress(screen: Console, cells: int) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal; in a log, a line for every tenth of the cells."""
    started = time.monotonic()
    if interactive(screen):
        row = Table.grid(padding=(0, 2))
        bar, text = ProgressBar(total=max(cells, 1), width=24), Text()
        row.add_row(bar, text)
        with Live(row, console=screen, refresh_per_second=4, transient=True):

            def move(done: int, total: int, what: str) -> None:
                bar.update(done, total)
                text.plain = f"{done} of {total} cells · {clock(time.monotonic() - started)} elapsed · {what}"

            yield move
        return
    printed = -1

    def line(done: int, total: int, what: str) -> None:
        nonlocal printed
        if 10 * done // max(total, 1) > printed:
            printed = 10 * done // max(total, 1)
            screen.print(f"{done} of {total} cells, {clock(time.monotonic() - started)}", style="dim")

    yield line


def _print(summary: dict[str, Any], seeds: int, screen: Console) -> None:
    for kind, board in summary["boards"].items():
        if len(summary["boards"]) > 1:
            screen.print("tables" if kind == "table" else "a tiny transformer", style="bold")
        _print_board(board, seeds, screen)
    for problem in summary["not_run"]:
        style = "red" if problem["status"] == "failed" else "yellow"
        screen.print(f"{problem['method']}, {problem['status']}: {problem['reason']}", style=style, soft_wrap=True)
    screen.print(
        "Samples count the whole budget where a task was not learned. No value: in some family no part of the exact "
        f"gradient was found in the method's. Everything about one method: {program()} methods METHOD",
        style="dim",
    )


def _print_board(board: dict[str, Any], seeds: int, screen: Console) -> None:
    from tokenloom.lab.results import FIGURES

    chosen = [f for f in FIGURES if f.name in SHOWN]
    rows = board["overall"]
    shown = table("method", *(f.label for f in chosen), right=tuple(f.label for f in chosen))
    shown.columns[0].no_wrap = True
    for name in sorted(rows, key=lambda m: rows[m]["samples"][0]):
        shown.add_row(name, *(_cell(figure, rows[name]) for figure in chosen))
    screen.print(shown)
    families = list(board["families"])
    over = families[0] if len(families) == 1 else f"{len(families)} families"
    screen.print(
        f"Means over {over}, {seeds} seed{'' if seeds == 1 else 's'}; ± half of a 95 % interval.\n", style="dim"
    )


def _cell(figure: Figure, row: dict[str, list[float | None]]) -> str:
    value, low, high = row[figure.name]
    if value is None:
        return "–"
    if figure.name == "noise" or low is None or high is None:
        return _number(value)
    return f"{_number(value)} ±{_number((high - low) / 2)}"


def _number(value: float) -> str:
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
