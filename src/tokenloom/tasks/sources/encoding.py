"""Entries of generated data sets as JSON, kept exact: tuples and dictionaries with keys that are not text."""

from __future__ import annotations

from typing import Any


def encode(value: Any) -> Any:
    """A JSON-able copy that `decode` turns back into an equal value of the same types.

    Subclasses of text and numbers, numpy's included, become the plain types.

    Raises:
        ValueError: for a value that JSON cannot hold.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, list):
        return [encode(each) for each in value]
    if isinstance(value, tuple):
        return {"~": "tuple", "of": [encode(each) for each in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and "~" not in value:
            return {str(key): encode(each) for key, each in value.items()}
        return {"~": "dict", "of": [[encode(key), encode(each)] for key, each in value.items()]}
    if isinstance(value, set | frozenset):
        return {"~": "set", "of": sorted((encode(each) for each in value), key=repr)}
    raise ValueError(f"a value of type {type(value).__name__} cannot be kept as JSON: {value!r:.80}")


def decode(value: Any) -> Any:
    """The value that `encode` was given."""
    if isinstance(value, list):
        return [decode(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "~" not in value:
        return {key: decode(each) for key, each in value.items()}
    inner = [decode(each) for each in value["of"]]
    if value["~"] == "tuple":
        return tuple(inner)
    return set(inner) if value["~"] == "set" else {key: each for key, each in inner}
