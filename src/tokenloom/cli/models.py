"""A model by any name that the command line takes: built-in, Hub, local folder, or run."""

from __future__ import annotations

from pathlib import Path

from tokenloom.cli.console import program
from tokenloom.cli.guard import UsageError


def run_of(name: str) -> Path | None:
    """The run folder that `name` is, if it is one."""
    folder = Path(name).expanduser()
    return folder if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file() else None


def model_source(name: str) -> str:
    """What `Policy.load` takes: a run stands for the model it ended with.

    Raises:
        UsageError: for a run without a model.
    """
    run = run_of(name)
    if run is None:
        return name
    if not (run / "model" / "config.json").is_file():
        raise UsageError(
            f"the run {run} has no model yet: it is written at the end. Finish it with: "
            f"{program()} train --resume {run}"
        )
    return str(run / "model")
