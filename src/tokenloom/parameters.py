"""Parameters of parts and presets: read off a signature, checked by name and type, described in a user's words."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from tokenloom.hints import suggest
from tokenloom.schedule import Schedule
from tokenloom.vocabulary import known_names


@dataclass(frozen=True)
class Hyperparameter:
    """A keyword-only parameter of a part: its annotation and the paper's default."""

    annotation: Any
    default: Any


def signature_inputs(
    name: str, function: Callable[..., Any], *, any_name: bool = False
) -> tuple[dict[str, bool], dict[str, Hyperparameter]]:
    """Injected names (and whether each is required) and hyperparameters of a function, checked.

    `any_name` allows positional names that are not in the vocabulary.

    Raises:
        ValueError: for a name outside the vocabulary or a hyperparameter without a default.
    """
    try:
        # The parameters of a class are those of its constructor.
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except NameError as error:
        raise ValueError(
            f"{name!r}: an annotation cannot be read ({error}); import it at run time, not under TYPE_CHECKING"
        ) from error
    inputs: dict[str, bool] = {}
    hyperparameters: dict[str, Hyperparameter] = {}
    vocabulary = known_names()
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY:
            if p.default is p.empty:
                raise ValueError(f"{name!r}: hyperparameter {p.name!r} needs a default (the paper's)")
            hyperparameters[p.name] = Hyperparameter(hints.get(p.name, Any), p.default)
        elif p.kind is not p.POSITIONAL_OR_KEYWORD:
            raise ValueError(f"{name!r}: parameter {p.name!r} must be an ordinary one or keyword-only")
        elif any_name or p.name in vocabulary:
            inputs[p.name] = p.default is p.empty
        else:
            raise ValueError(
                f"{name!r}: positional parameter {p.name!r} is not in the vocabulary (hyperparameters go behind a "
                f"bare *){suggest(p.name, vocabulary)}"
            )
    return inputs, hyperparameters


def check_parameters(owner: str, given: Mapping[str, Any], known: Mapping[str, Hyperparameter]) -> dict[str, Any]:
    """Check hyperparameters by name and type; schedules (recipe form included) may stand where a float may.

    Raises:
        ValueError: naming the key, the value, what is allowed and the nearest known name.
    """
    checked: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"{owner}: unknown parameter {key!r}{suggest(key, known)}")
        annotation = known[key].annotation
        if isinstance(value, Mapping) and "schedule" in value:
            try:
                value = Schedule.parse(value)
            except ValueError as error:
                raise ValueError(f"{owner}: {key}: {error}") from None
        if not (_accepts(annotation, value) or (isinstance(value, Schedule) and _accepts(annotation, 0.5))):
            raise ValueError(f"{owner}: {key} = {value!r} is not allowed; it takes {describe_type(annotation)}")
        checked[key] = value
    return checked


def describe_type(annotation: Any) -> str:
    """An annotation in a user's words."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(a) for a in get_args(annotation))
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(describe_type(a) for a in get_args(annotation))
    if annotation is type(None):
        return "null"
    return {"float": "a number", "int": "an integer", "bool": "true or false", "str": "text"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _accepts(annotation: Any, value: Any) -> bool:
    if annotation is Any:
        return True
    origin = get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(a, value) for a in get_args(annotation))
    if origin is Literal:
        return value in get_args(annotation)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or annotation
    return isinstance(value, kind) if isinstance(kind, type) else True
