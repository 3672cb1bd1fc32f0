"""Verifiers by name: plain functions `(response, item, **params) -> reward | (reward, answer)`.

A reward of 1 means right. Built-in ones are one file each; users' own are named by import path. An item whose answer
is None has no label: the parsed answer is given with a reward of 0, for methods that let the responses vote.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any, cast

from tokenloom.tasks.importing import FORMS, import_target, split_target
from tokenloom.tasks.names import unknown
from tokenloom.tasks.outcome import VerifierFunction

BUILT_IN: dict[str, str] = {
    "exact": "tokenloom.tasks.verifiers.exact",
    "number": "tokenloom.tasks.verifiers.number",
    "choice": "tokenloom.tasks.verifiers.choice",
    "regex": "tokenloom.tasks.verifiers.regex",
    "math": "tokenloom.tasks.verifiers.symbolic",
    "reasoning_gym": "tokenloom.tasks.verifiers.gym",
}
"""Module of each built-in verifier; the function in it is called `verify`."""

IN_PROCESS = frozenset({"exact", "number", "choice"})
"""Verifiers whose time is linear in the response, so that they need no process to kill."""


def load(name: str) -> VerifierFunction:
    """The verifier function of a built-in name or an import path.

    Raises:
        ValueError: when there is no such verifier or it is not callable.
    """
    if name in BUILT_IN:
        return cast(VerifierFunction, importlib.import_module(BUILT_IN[name]).verify)
    function = import_target(name)
    if not callable(function):
        raise ValueError(f"verifier {name!r} is a {type(function).__name__}, not something callable")
    return cast(VerifierFunction, function)


def prepare(name: str) -> None:
    """Imports what a built-in verifier imports late, so that this is not on the first response's clock."""
    if name in BUILT_IN:
        getattr(importlib.import_module(BUILT_IN[name]), "prepare", lambda: None)()


def check(name: str, params: Mapping[str, Any]) -> None:
    """Refuses what can be refused without importing the user's code.

    Raises:
        ValueError: unknown verifier, malformed import path, unknown parameter, bad value.
    """
    if name in BUILT_IN:
        check_params(name, load(name), params)
    elif ":" in name:
        split_target(name)
    else:
        raise ValueError(f"{unknown('verifier', name, BUILT_IN)}; your own is named by {FORMS}")


def check_params(name: str, function: VerifierFunction, params: Mapping[str, Any]) -> None:
    """Raises ValueError unless `function(response, item, **params)` is a possible call."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a callable in C without a signature: only the call itself can tell
    accepted = list(signature.parameters.values())
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted):
        allowed = [parameter.name for parameter in accepted[2:]]
        for given in params:
            if given not in allowed:
                raise ValueError(unknown(f"parameter of verifier {name!r}", given, allowed))
    try:
        signature.bind("", None, **params)
    except TypeError as error:
        call = f"(response, item, {', '.join(params)})" if params else "(response, item)"
        raise ValueError(f"verifier {name!r} cannot be called as {call}: {error}") from None
    if name in BUILT_IN:
        _check_values(name, accepted, params)


def _check_values(name: str, accepted: list[inspect.Parameter], params: Mapping[str, Any]) -> None:
    """Types of built-in parameters, which are annotated `bool`, `int`, `float`, `str` or `dict`."""
    kinds: dict[str, tuple[type, ...]] = {
        "bool": (bool,), "int": (int,), "float": (int, float), "str": (str,), "dict[str, Any]": (dict,)
    }  # fmt: skip
    for parameter in accepted:
        if parameter.name not in params:
            continue
        value, wanted = params[parameter.name], str(parameter.annotation)
        fits = isinstance(value, kinds[wanted]) and (wanted == "bool" or not isinstance(value, bool))
        if not fits:
            raise ValueError(f"parameter {parameter.name!r} of verifier {name!r} must be {wanted}, got {value!r}")
        if parameter.name == "pattern":
            _check_pattern(str(value))
    known_ways = getattr(importlib.import_module(BUILT_IN[name]), "EXTRACT", None)
    if known_ways is not None and params.get("extract", known_ways[0]) not in known_ways:
        raise ValueError(unknown(f"`extract` of verifier {name!r}", str(params["extract"]), known_ways))


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`pattern` of verifier 'regex' is not a regular expression: {error}: {pattern!r}") from None
