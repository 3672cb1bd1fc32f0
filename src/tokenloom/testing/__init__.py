"""The laws that every part obeys, ready to run on your own: `tokenloom.testing.check(my_part)`.

A law is waived only by a property that the part declares (`properties={...}` of `@part`) or by its
stage and scope, never by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

# Modules that are imported "as" what they are called register laws; `check` runs them in this order.
from tokenloom import decoding_laws as decoding_laws
from tokenloom.catalog import Part, get_part, parts
from tokenloom.laws import Law, laws_for
from tokenloom.testing import results as results
from tokenloom.testing import stages as stages
from tokenloom.testing import surrogates as surrogates
from tokenloom.testing import whole_losses as whole_losses
from tokenloom.testing.batches import evaluate, random_batch, vocabulary_values
from tokenloom.testing.variations import HOSTILE, TOLERANCE, same
from tokenloom.testing.whole_losses import host

__all__ = [
    "HOSTILE", "TOLERANCE", "check", "evaluate", "host", "pairs", "random_batch", "same", "vocabulary_values",
]  # fmt: skip


def pairs() -> Iterator[tuple[Part, Law]]:
    """Every (part, law) pair of the library's own catalog."""
    for part in parts().values():
        if part.family != "user":
            yield from ((part, each) for each in laws_for(part))


def check(part: str | Callable[..., Any]) -> list[str]:
    """Run every law on a part (a decorated function, a name or an import path); returns the names of the laws run.

    Raises:
        AssertionError: naming the part, the law and what differed.
        ValueError: when it is not a part.
    """
    found = get_part(part) if isinstance(part, str) else getattr(part, "__part__", None)
    if not isinstance(found, Part):
        raise ValueError(f"{part!r} is not a part: decorate the function with @part(...)")
    found_laws = laws_for(found)
    for each in found_laws:
        each.check(found)
    return [each.name for each in found_laws]
