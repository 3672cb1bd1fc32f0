"""Laws: named checks that a stage's parts must pass, registered where they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenloom.catalog import Part


@dataclass(frozen=True)
class Law:
    """A named check with the parts it speaks of."""

    name: str
    applies: Callable[[Part], bool]
    check: Callable[[Part], None]


_LAWS: list[Law] = []


def law(applies: Callable[[Part], bool]) -> Callable[[Callable[[Part], None]], Callable[[Part], None]]:
    """Register a function as the law that is called as the function is."""

    def register(check: Callable[[Part], None]) -> Callable[[Part], None]:
        _LAWS.append(Law(check.__name__.removeprefix("_").replace("_", "-"), applies, check))
        return check

    return register


def laws_for(part: Part) -> list[Law]:
    """The laws that speak of a part."""
    return [law for law in _LAWS if law.applies(part)]
