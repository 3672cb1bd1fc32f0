"""Decoding methods as text: `temperature:value=0.7+top-h:alpha=0.4+cntp`.

Methods are joined by `+` and applied in that order; parameters follow a colon, separated by commas. What a parameter is
worth is read as YAML (0.4, true, text); objects that a method takes are named the same way, `amateur=my/model` for a
model and `reward=my_rewards.py:score` for a function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from tokenloom.decode.registry import Decoder, Kind, build, decoders
from tokenloom.hints import suggest
from tokenloom.parameters import check_parameters


@dataclass(frozen=True)
class Spec:
    """A method's slug and the text of its parameters by name."""

    slug: str
    given: dict[str, str]


def parse(text: str) -> list[Spec]:
    """The methods that `text` names.

    Raises:
        ValueError: for an empty name or a parameter without a value.
    """
    specs = []
    for piece in text.split("+"):
        slug, _, rest = piece.strip().partition(":")
        if not slug:
            raise ValueError(f"{text!r}: a method's name is missing; write NAME:key=value,key=value and join with +")
        given = {}
        for pair in rest.split(",") if rest else []:
            key, equals, value = pair.partition("=")
            if not equals or not key.strip():
                raise ValueError(f"{piece.strip()!r}: {pair!r} is not key=value")
            given[key.strip().replace("-", "_")] = value.strip()
        specs.append(Spec(slug, given))
    return specs


def find(spec: Spec, kinds: tuple[Kind, ...] = ("shaper", "loop")) -> Decoder:
    """The decoder a spec names, of the first of `kinds` that has it; before others, one that lacks no object.

    Raises:
        ValueError: when there is none.
    """
    found = [decoders(kind)[spec.slug] for kind in kinds if spec.slug in decoders(kind)]
    at_hand = {"model", "tokenizer", "vocabulary", *spec.given}
    for decoder in found:
        if {name for name, required in decoder.inputs.items() if required} <= at_hand:
            return decoder
    if found:
        return found[0]
    known = {slug for kind in kinds for slug in decoders(kind)}
    raise ValueError(f"unknown {' or '.join(kinds)} {spec.slug!r}{suggest(spec.slug, known)}")


def made(spec: Spec, found: Decoder, objects: dict[str, Any], load: Callable[[str, str], Any] | None = None) -> Any:
    """Build a spec's decoder; `load(name, text)` turns an object's text into the object.

    Raises:
        ValueError: as `registry.build`.
    """
    own = dict(objects)
    for key, text in spec.given.items():
        if key in found.inputs:
            if load is None:
                raise ValueError(f"{spec.slug}: {key} cannot be given as text here")
            own[key] = load(key, text)
    return build(found.kind, spec.slug, own, **parameters(spec, found))


def parameters(spec: Spec, found: Decoder) -> dict[str, Any]:
    """A spec's hyperparameters, read and checked.

    Raises:
        ValueError: for an unknown parameter or a value of the wrong type.
    """
    read = {key: _value(spec, key, text) for key, text in spec.given.items() if key not in found.inputs}
    return check_parameters(f"{found.kind} {spec.slug!r}", read, found.parameters)


def _value(spec: Spec, key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"{spec.slug}: {key}={text!r} cannot be read; quote text that has special signs") from None
