"""YAML and plain data: what a recipe may consist of, read and written so that nothing is guessed or blown up."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from tokenloom.train.errors import RecipeError

MAX_VALUES = 20_000
MAX_DEPTH = 40
_EXPONENT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)[eE][-+]?[0-9]+$")
_TIMESTAMP, _FLOAT = "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for three things: 1e-5 is a number, a date is text, and a key stands once in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            # "<<" takes what it merges; keys beside it win over those, and may repeat them.
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as a number, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != _TIMESTAMP]
    for first, known in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str, source: str) -> Any:
    """Plain data from YAML text.

    Raises:
        RecipeError: naming `source`, for malformed YAML, repeated keys, and what `plain` refuses.
    """
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from error
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from error
    return plain(data, source)


def write_yaml(data: Any) -> str:
    """YAML text that `read_yaml` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def plain(data: Any, source: str) -> Any:
    """A copy made of dicts with keys of text, lists, text, numbers, booleans and None alone.

    Aliases are written out in the copy, up to a size at which no recipe arrives honestly.

    Raises:
        RecipeError: naming `source`, the place and the value, for anything else or too much.
    """
    count = 0

    def copy(value: Any, place: str, depth: int) -> Any:
        nonlocal count
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise RecipeError(
                f"{source}: more than {MAX_VALUES} values, or nested more than {MAX_DEPTH} deep, with aliases written "
                "out; keep data in a file of its own"
            )
        if value is None or isinstance(value, str | bool | int | float):
            return value
        if isinstance(value, list | tuple):
            return [copy(v, f"{place}.{i}" if place else str(i), depth + 1) for i, v in enumerate(value)]
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    where = f" in {place}" if place else ""
                    raise RecipeError(f"{source}: the key {key!r}{where} is no text; put it in quotes")
            return {k: copy(v, f"{place}.{k}" if place else k, depth + 1) for k, v in value.items()}
        raise RecipeError(
            f"{source}: {place + ' ' if place else ''}is a {type(value).__name__}, which a recipe cannot hold; it has "
            "text, numbers, true and false, lists and mappings"
        )

    return copy(data, "", 0)
