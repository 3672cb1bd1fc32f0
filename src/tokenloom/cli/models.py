"""A model by any name that the command line takes: built-in, Hub, local folder, or run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenloom.cli.console import program
from tokenloom.cli.guard import UsageError

if TYPE_CHECKING:
    from tokenloom.policy import ModelConfig, Policy


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


def load_policy(name: str, config: ModelConfig | None = None, *, seed: int = 0) -> Policy:
    """The model by that name, with its tokenizer.

    Raises:
        UsageError: when there is no such model, or it is none that can be used.
    """
    from tokenloom.policy import Policy

    source = model_source(name)
    try:
        policy = Policy.load(source, config, seed=seed)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if policy.tokenizer is None:
        raise UsageError(f"{name} has no tokenizer that loads; put the tokenizer's files beside the model's")
    return policy
