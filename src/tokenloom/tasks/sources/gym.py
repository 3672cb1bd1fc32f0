"""Items of reasoning-gym's procedural data sets: `reasoning_gym:<name>`.

Item i of a data set under seed s is item i - 1 under seed s + 1, so new items come from moving the
seed by whole blocks, and repetition is judged by content alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from tokenloom.tasks.item import Item
from tokenloom.tasks.names import unknown
from tokenloom.tasks.sources.encoding import encode

DEFAULT_SIZE = 1000

_OWN = {"seed": "`task.seed`", "size": "`task.size`"}
_LONGEST_DROUGHT = 20_000


def check(name: str, params: Mapping[str, Any]) -> None:
    """Refuses unknown data sets, unknown or impossible parameters; generates nothing.

    Raises:
        ValueError: naming the nearest known name, or what the data set says of its parameters.
    """
    build_config(name, params, seed=0, size=1)


def build_config(name: str, params: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """The data set's own configuration object, its values converted to the declared types."""
    sets = datasets()
    if name not in sets:
        raise ValueError(unknown("reasoning-gym data set", name, sets))
    kind = sets[name][1]
    types = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind) if field.name not in _OWN]
    values: dict[str, Any] = {}
    for key, value in params.items():
        if key in _OWN:
            raise ValueError(f"parameter {key!r} of reasoning_gym:{name} is set by {_OWN[key]}, not in `params`")
        if key not in known:
            raise ValueError(unknown(f"parameter of reasoning_gym:{name}", key, known, limit=30))
        try:
            values[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ValueError(f"parameter {key!r} of reasoning_gym:{name}: {reason}, got {value!r}") from None
    config = kind(**values, seed=seed, size=size)
    try:
        if hasattr(config, "validate"):
            config.validate()
    except (AssertionError, ValueError, TypeError) as error:
        raise ValueError(f"reasoning_gym:{name} refuses the parameters {dict(params)}: {error}") from error
    return config


def build(name: str, params: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """The data set of `size` entries that starts at `seed`."""
    return datasets()[name][0](build_config(name, params, seed=seed, size=size))


def draw(name: str, params: Mapping[str, Any], *, seed: int, size: int) -> tuple[list[Item], str]:
    """`size` distinct items, or all there seem to be, and a note when there were fewer.

    A data set counts as exhausted after a run of repeated items ten times as long as the number of
    distinct ones (at most 20,000): an item as likely as the others is then missed with
    probability below 5e-5.
    """
    items: dict[str, Item] = {}
    drought = 0
    drawn = 0
    for entry in _entries(name, params, seed=seed, block=max(size, 100)):
        item = _item(name, params, entry)
        drawn += 1
        drought = drought + 1 if item.key in items else 0
        items.setdefault(item.key, item)
        if len(items) == size:
            return list(items.values()), ""
        if drought >= min(10 * len(items) + 100, _LONGEST_DROUGHT):
            break
    return list(items.values()), (
        f"reasoning_gym:{name} seems to have only {len(items)} distinct problems with these parameters "
        f"({size} wanted; {drawn} draws, nothing new in the last {drought})"
    )


def _entries(name: str, params: Mapping[str, Any], *, seed: int, block: int) -> Iterator[dict[str, Any]]:
    start = seed
    while True:
        dataset = build(name, params, seed=start, size=block)
        for index in range(block):
            yield dataset[index]
        start += block


def _item(name: str, params: Mapping[str, Any], entry: Mapping[str, Any]) -> Item:
    plain = json.loads(json.dumps(dict(params), default=str))
    return Item(
        prompt=str(entry["question"]),
        answer=encode(entry["answer"]),
        metadata={"dataset": name, "params": plain, "entry": encode(dict(entry))},
    )


def datasets() -> Mapping[str, tuple[Any, Any]]:
    """The classes of each data set and of its configuration, by name.

    Raises:
        ValueError: when reasoning-gym is not installed.
    """
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            "a `reasoning_gym:` source needs the package reasoning-gym: pip install reasoning-gym"
        ) from error
    return dict(DATASETS)
