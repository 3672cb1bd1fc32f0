"""How a run ended, where its results are, and what to try next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from tokenloom.cli.clock import clock
from tokenloom.cli.console import pairs, program

if TYPE_CHECKING:
    from tokenloom.train.loop import Outcome
    from tokenloom.train.recipe import Recipe

PLACES = (
    ("model", "model", "an ordinary Hugging Face folder"),
    ("metrics", "metrics.jsonl", "one line a step and evaluation"),
    ("tokens", "tokens.jsonl", "what happened to each token"),
    ("report", "report.html", "curves, samples and tokens: open it in a browser"),
)


def print_outcome(
    outcome: Outcome, recipe: Recipe, report: Path | None, seconds: float, out: Console, *, quiet: bool
) -> None:
    """Print before and after, the places of the results, and commands that go on from here."""
    early = ", stopped early" if outcome.stopped_early else ""
    if not quiet:
        out.print()
    out.print(Text(f"Done: {outcome.steps} steps{early}, {clock(seconds)}.", style="bold green"))
    if not quiet:
        rows: list[tuple[str, str | Text]] = []
        before, after = outcome.before, outcome.after
        for name in ("greedy", "sampled"):
            value = getattr(after, name)
            if value is not None:
                first = None if before is None else getattr(before, name)
                rows.append((f"held-out {name}", change(first, value, out)))
        pairs(out, rows)
    print_places(outcome.run, out)
    if not quiet:
        print_next(outcome.run, recipe, out, has_report=report is not None)


def print_places(run: Path, out: Console) -> None:
    """Print where the results of a run are."""
    found = [(name, run / file, what) for name, file, what in PLACES if (run / file).exists()]
    width = max((len(str(path)) for _, path, _ in found), default=0)
    pairs(out, [(name, Text(str(path).ljust(width)).append(f"  {what}", style="dim")) for name, path, what in found])


def print_next(run: Path, recipe: Recipe, out: Console, *, has_report: bool) -> None:
    """Print commands to paste."""
    folder, name = shlex.quote(str(run)), program()
    look = [(f"{name} report {folder}", "the run at a glance" + ("" if has_report else ", and report.html"))]
    more = [
        (f"{name} eval {folder} --samples 16 --k 1,4,8", "accuracy with intervals, pass@k"),
        (f'{name} generate {folder} "{_example(run)}"', "talk to the result"),
    ]
    other = another_algorithm(recipe)
    if other:
        more.append((f"{name} train {folder} algorithm={other}", "the same recipe, another algorithm"))
    out.print(Text("Next, for example:", style="bold"))
    width = max(len(command) for command, _ in look + more)
    for command, what in look + more:
        line = Text(f"  {command}", style="cyan")
        # On a narrow terminal the commands stay whole, and unexplained.
        if 2 + width + 4 + len(what) <= out.width:
            line.append(" " * (width - len(command)) + f"  # {what}", style="dim")
        out.print(line, soft_wrap=True)


def change(before: float | None, after: float, out: Console) -> Text:
    """ "31.0% → 74.0%" with the gain in points."""
    if before is None:
        return Text(f"{after:.1%}", style="bold")
    arrow = "→" if (out.encoding or "").lower().startswith("utf") else "->"
    points = 100 * (after - before)
    text = Text(f"{before:.1%} {arrow} ").append(f"{after:.1%}", style="bold")
    return text.append(f"  ({points:+.1f} points)", style="green" if points > 0 else "red" if points < 0 else "")


def another_algorithm(recipe: Recipe) -> str | None:
    """A preset that needs no more from the model than the recipe's own, and is another composition."""
    from tokenloom.algorithm import Algorithm
    from tokenloom.catalog import presets

    mine = recipe.build_algorithm()
    needs = mine.needs | mine.loss_needs
    slugs = sorted(presets())
    after = [s for s in slugs if s > mine.preset] + [s for s in slugs if s < mine.preset]
    for slug in after:
        other = Algorithm.from_recipe(slug)
        if (other.needs | other.loss_needs) <= needs and other.recipe() != mine.recipe():
            return slug
    return None


def _example(run: Path) -> str:
    """A held-out prompt that a shell takes inside double quotes, or a general one."""
    import json

    try:
        with (run / "samples.jsonl").open(encoding="utf-8") as file:
            text = str(json.loads(file.readline())["prompt"])
    except (OSError, ValueError, KeyError):
        text = ""
    plain = text.isprintable() and not set(text) & set('"$`\\!')
    return text if text and plain and len(text) < 100 else "What is 7 + 8?"
