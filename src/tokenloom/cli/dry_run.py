"""`tokenloom train --dry-run`: what a run is made of and what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from tokenloom.cli.clock import clock
from tokenloom.cli.console import count, pairs, table
from tokenloom.cli.header import print_plan

if TYPE_CHECKING:
    from tokenloom.tasks import Task
    from tokenloom.train.estimate import Estimate
    from tokenloom.train.recipe import Recipe

CHEAP_FILE = 50_000_000


def print_dry_run(recipe: Recipe, out: Console) -> None:
    """Print composition, sizes and estimates, and the resolved recipe; weights are never loaded."""
    from tokenloom.train.estimate import estimate

    print_plan(recipe, None, out)
    task = _cheap_task(recipe)
    found = estimate(recipe, task)
    out.print()
    out.print("Sizes", style="bold")
    pairs(out, _sizes(recipe, task, found))
    out.print()
    out.print("Memory, an estimate", style="bold")
    shown = table("  what", "GB", right=("GB",))
    for name, size in found.memory.items():
        shown.add_row(f"  {name}", _gigabytes(size))
    shown.add_row(Text(f"  at most, while {found.phase}", style="bold"), Text(_gigabytes(found.peak), style="bold"))
    out.print(shown)
    out.print("  Not everything exists at once: the cache goes before gradients come.", style="dim")
    out.print()
    out.print("Time on this machine, a rough estimate", style="bold")
    pairs(out, [("a step", f"{found.step_seconds:,.1f} s"), ("evaluations", clock(found.evaluation_seconds)),
                ("the run", clock(found.total_seconds))])  # fmt: skip
    out.print()
    out.print("Assumed", style="bold")
    for line in found.assumptions:
        out.print(f"  {line}", soft_wrap=True)
    out.print()
    out.print("The recipe in full", style="bold")
    for line in recipe.to_yaml().rstrip().splitlines():
        out.print(f"  {line}", soft_wrap=True, style="dim")


def _sizes(recipe: Recipe, task: Task | None, found: Estimate) -> list[tuple[str, str | Text]]:
    shape = found.shape
    kind = "" if shape.trained == shape.weights else f", {count(shape.trained)} trained"
    rows: list[tuple[str, str | Text]] = [
        ("parameters", f"{count(shape.weights)}{kind}; {shape.layers} layers, width {shape.hidden}"),
        ("problems", "known only when the task is loaded" if task is None else task.report),
        ("samples", f"{found.responses:,} responses in {recipe.train.steps} steps, at most {found.tokens:,} tokens"),
        ("updates", f"{found.updates} a step, {found.micro_batches} micro-batches in all"),
        ("signals", ", ".join(found.needs)),
    ]
    return rows


def _cheap_task(recipe: Recipe) -> Task | None:
    """The task, if making it costs no download and little time."""
    from tokenloom.tasks import load_task

    for source in recipe.task.all_sources:
        kind = source.source.partition(":")[0]
        local = Path(source.source)
        if kind == "hf" or (kind != "reasoning_gym" and local.is_file() and local.stat().st_size > CHEAP_FILE):
            return None
    return load_task(recipe.task)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size >= 5e6 else "< 0.01"
