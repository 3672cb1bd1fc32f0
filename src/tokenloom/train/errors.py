"""Errors of a run in a user's words."""

from __future__ import annotations

import difflib
import re
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tokenloom.hints import suggest


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the key, the value and the remedy."""


class TrainingDiverged(RuntimeError):
    """Losses or gradients stopped being numbers several steps in a row."""


def explain(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """One line per problem: key, value, what is allowed, nearest known name."""
    allowed: dict[str, tuple[Any, list[str]]] = {}
    for problem in error.errors():
        key = ".".join(_keys(model, problem["loc"])) or "recipe"
        given, says = allowed.setdefault(key, (problem.get("input"), []))
        text = _says(model, key, problem)
        if text not in says:
            says.append(text)
    lines = []
    for key, (given, says) in allowed.items():
        if isinstance(given, dict) and any(k.startswith(f"{key}.") for k in allowed):
            # Only the other readings of this key: its own mapping has been looked into, with better words.
            continue
        simple = [s.removeprefix(_MUST) for s in says if s.startswith(_MUST)]
        said = [s for s in says if not s.startswith(_MUST)]
        if simple:
            said.insert(0, _MUST + " or ".join(simple))
        whole = key == "recipe" or isinstance(given, BaseModel) or (isinstance(given, dict) and not simple)
        shown = "" if whole or said[0].startswith(_NO_VALUE) else f" = {_short(given)}"
        lines += [f"{key}{shown}: {text}" for text in said]
    return f"{source}: " + "\n  ".join(["the recipe cannot be run:", *lines])


_MUST = "must be "
_NO_VALUE = ("unknown key", "missing")
_WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "list_type": "a list",
    "tuple_type": "a list",
    "finite_number": "a finite number",
}


def _says(model: type[BaseModel], key: str, problem: ErrorDetails) -> str:
    kind, given = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        *section, name = key.split(".")
        known = _known_keys(model, section)
        elsewhere = [k for k in _all_keys(model) if k.split(".")[-1] == name]
        if elsewhere:
            return f"unknown key; did you mean {' or '.join(repr(k) for k in elsewhere)}?"
        return f"unknown key{suggest(name, known)}"
    if kind == "missing":
        return "missing, and there is no default"
    if kind in _WORDS:
        return _MUST + _WORDS[kind]
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", problem.get("ctx", {}).get("expected", ""))
        near = difflib.get_close_matches(str(given), names, n=1)
        return message.replace("Input should be ", _MUST) + (f"; did you mean {near[0]!r}?" if near else "")
    return message.replace("Input should be ", _MUST)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _keys(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """A location without the names that pydantic gives to the members of a union."""
    keys: list[str] = []
    here: Any = model
    for name in location:
        members = [a for a in get_args(here) if a is not type(None)] if _is_union(here) else [here]
        if len(members) > 1:
            # This entry says which member was tried; it is no key.
            here = next((m for m in members if getattr(m, "__name__", "") == name), None)
            continue
        (here,) = members
        keys.append(str(name))
        if isinstance(here, type) and issubclass(here, BaseModel) and name in here.model_fields:
            here = here.model_fields[str(name)].annotation
        elif get_origin(here) is list:
            (here,) = get_args(here)
        else:
            here = None
    return keys


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    here: Any = model
    for name in path:
        if isinstance(here, type) and issubclass(here, BaseModel) and name in here.model_fields:
            here = _section(here.model_fields[name].annotation)
        elif not name.isdigit():
            return []
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all keys, but for those inside lists."""
    found = []
    for name, field in model.model_fields.items():
        found.append(f"{prefix}{name}")
        inner = field.annotation if get_origin(field.annotation) is not list else None
        section = _section(inner)
        if isinstance(section, type) and issubclass(section, BaseModel):
            found += _all_keys(section, f"{prefix}{name}.")
    return found


def _section(annotation: Any) -> Any:
    """The pydantic model inside `Section | None` or `list[Section]`, if there is one."""
    if _is_union(annotation) or get_origin(annotation) is list:
        inner = [_section(a) for a in get_args(annotation)]
        return next((a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return annotation
