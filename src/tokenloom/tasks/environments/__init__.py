"""Environments by name, or by import path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenloom.tasks.environment import Environment
from tokenloom.tasks.importing import FORMS, import_target, split_target
from tokenloom.tasks.names import unknown

BUILT_IN = {"calculator": "tokenloom.tasks.environments.calculator:CalculatorEnvironment"}


def check_environment(name: str) -> None:
    """Raises ValueError for an unknown name or a malformed import path."""
    if ":" in name:
        split_target(name)
    elif name not in BUILT_IN:
        raise ValueError(f"{unknown('environment', name, BUILT_IN)}; your own is named by {FORMS}")


def environment_factory(name: str, params: Mapping[str, Any]) -> Callable[[], Environment]:
    """A function that makes fresh environments; one is made at once to see that it works.

    Raises:
        ValueError: when there is no such class, it refuses `params`, or it has no `reset` and `step`.
    """
    check_environment(name)
    kind = import_target(BUILT_IN.get(name, name))

    def make() -> Environment:
        made = kind(**params)
        if not isinstance(made, Environment):
            raise ValueError(f"environment {name!r} makes a {type(made).__name__} without `reset` and `step`")
        return made

    try:
        make()
    except TypeError as error:
        raise ValueError(f"environment {name!r} cannot be made with {dict(params)}: {error}") from error
    return make
