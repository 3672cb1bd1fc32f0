"""`tokenloom train`: begin a run, resume one, or say what one would take."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tokenloom.cli.console import can_ask, console, program, quiet_libraries, table
from tokenloom.cli.guard import Interrupted, UsageError, guarded

if TYPE_CHECKING:
    from tokenloom.train.recipe import Recipe


@guarded
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A shipped recipe, a .yaml file, or a run folder.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to change, section.key=value.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder to make; default runs/NAME-001, or the next free.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to continue, after a stop at any moment.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run is made of and what it takes; train nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="With --resume: go on although the recipe differs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only where the results are.")] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Do not write report.html.")] = False,
) -> None:
    """Train a model on a verifiable task, as a recipe says.

    The run folder holds everything: the resolved recipe, metrics, samples, checkpoints, the model, the report.


    Examples:
      tokenloom train quickstart
      tokenloom train quickstart algorithm=dapo rollout.group_size=16 train.seed=1
      tokenloom train my.yaml --out runs/first
      tokenloom train quickstart --dry-run
      tokenloom train --resume runs/quickstart-001
      tokenloom train --resume runs/quickstart-001 train.steps=60    # shows the difference and asks
    """
    source, changes = _source(recipe, overrides or [], resume)
    from tokenloom.train.recipe import load_recipe

    screen = console()
    loaded = load_recipe(source, changes)
    if dry_run:
        from tokenloom.cli.dry_run import print_dry_run

        quiet_libraries(screen)
        print_dry_run(loaded, screen)
        return
    run = resume or out or _next_folder(loaded)
    if resume is None:
        if (run / "recipe.yaml").exists():
            raise UsageError(
                f"{run} already holds a run. Continue it with `{program()} train --resume {run}`, or choose another "
                "folder with --out"
            )
        if force:
            raise UsageError("--force goes with --resume; a new run never replaces an old one")
    elif not _agreed(loaded, run, force, screen):
        return
    _run(loaded, run, screen, resume=resume is not None, force=force or resume is not None, quiet=quiet,
         report=loaded.log.report and not no_report)  # fmt: skip


def _source(recipe: str | None, overrides: list[str], resume: Path | None) -> tuple[str, list[str]]:
    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        overrides, recipe = [recipe, *overrides], None
    for text in overrides:
        if "=" not in text:
            raise UsageError(f"{text!r} is not of the form section.key=value, and only one recipe can be given")
    if resume is not None and not (resume / "recipe.yaml").is_file():
        raise UsageError(
            f"{resume} is not a run folder: there is no recipe.yaml in it. To begin a run there: "
            f"{program()} train RECIPE --out {resume}"
        )
    source = recipe or (None if resume is None else str(resume))
    if source is None:
        from tokenloom.train.recipe import recipe_names

        raise UsageError(
            f"which recipe? Shipped are: {', '.join(recipe_names())}; a .yaml file or a run folder does too. "
            f"For example: {program()} train quickstart"
        )
    return source, overrides


def _next_folder(recipe: Recipe) -> Path:
    from tokenloom.train.run import next_run_folder

    return next_run_folder(re.sub(r"[^\w.-]+", "-", recipe.name).strip("-.") or "run")


def _agreed(recipe: Recipe, run: Path, force: bool, screen: Console) -> bool:
    """Whether to go on with a run that exists; prints why not, or what differs."""
    from tokenloom.train.run import RunFolder

    folder = RunFolder(run)
    changes, finished = folder.changed(recipe), folder.finished
    folder.close()
    if not changes:
        if finished:
            from tokenloom.cli.outcome import print_places

            screen.print(f"{run} is finished; there is nothing to resume.")
            print_places(run, screen)
        return not finished
    screen.print(f"The recipe differs from the one that {run} was begun with:")
    shown = table("key", "begun with", "now")
    for key, (old, new) in changes.items():
        shown.add_row(key, str(old), str(new))
    screen.print(shown)
    if force:
        return True
    if not can_ask(screen):
        raise UsageError("a changed recipe is not resumed unasked; --force goes on with it, or begin a new run")
    if not typer.confirm("Go on with the changed recipe? The folder will hold the new one"):
        raise typer.Exit(1)
    return True


def _run(recipe: Recipe, run: Path, screen: Console, *, resume: bool, force: bool, quiet: bool, report: bool) -> None:
    from tokenloom.train.trackers import make_trackers

    trackers = make_trackers(recipe, run)
    from tokenloom.cli.header import print_model, print_plan
    from tokenloom.cli.outcome import print_outcome
    from tokenloom.cli.progress import progress_observer

    quiet_libraries(screen, warnings_only=quiet)
    from tokenloom.train.session import Session

    observer = progress_observer(recipe, screen, quiet=quiet)
    if not quiet:
        print_plan(recipe, run, screen)
    started = time.monotonic()
    try:
        with Session(recipe, run, [observer, *trackers], resume=resume, force=force) as session:
            if not quiet:
                print_model(session.trainer.policy, screen)
            outcome = session.trainer.train()
    except KeyboardInterrupt:
        raise Interrupted(_interrupted(run)) from None
    written = None
    if report:
        from tokenloom.report import write_report

        written = write_report(run)
    print_outcome(outcome, recipe, written, time.monotonic() - started, screen, quiet=quiet)


def _interrupted(run: Path) -> str:
    if not (run / "recipe.yaml").is_file():
        return "stopped before anything was begun"
    from tokenloom.train.checkpoint import steps

    saved = steps(run / "checkpoints")
    where = f"after step {saved[-1]}, its last checkpoint" if saved else "from the beginning: no checkpoint yet"
    return f"stopped. It resumes {where}, with: {program()} train --resume {run}"
