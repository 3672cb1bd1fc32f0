"""Errors of a run in a user's words."""

from __future__ import annotations

from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from tokenloom.catalog import suggest


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the key, the value and the remedy."""


class TrainingDiverged(RuntimeError):
    """Losses or gradients stopped being numbers several steps in a row."""


def explain(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """One line per problem: key, value, what is allowed, nearest known name."""
    lines = []
    for problem in error.errors():
        location = [str(p) for p in problem["loc"]]
        key = ".".join(location) or "recipe"
        if problem["type"] == "extra_forbidden":
            known = _known_keys(model, location[:-1])
            lines.append(f"{key}: unknown key{suggest(location[-1], known)}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: missing, and there is no default")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem.get("input")
            shown = "" if isinstance(given, dict | BaseModel) else f" = {given!r}"
            lines.append(f"{key}{shown}: {message}")
    return f"{source}: " + "\n  ".join(["the recipe cannot be run:", *lines])


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    here: Any = model
    for name in path:
        if isinstance(here, type) and issubclass(here, BaseModel) and name in here.model_fields:
            here = _section(here.model_fields[name].annotation)
        elif not name.isdigit():
            return []
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []


def _section(annotation: Any) -> Any:
    """The pydantic model inside `Section | None` or `list[Section]`, if there is one."""
    if get_origin(annotation) in (Union, UnionType, list):
        inner = [_section(a) for a in get_args(annotation)]
        return next((a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return annotation
