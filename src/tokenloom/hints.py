"""What an error message adds to a name that nobody knows: the nearest names that somebody does."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHORT = 16


def suggest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the nearest known names, or the list when nothing is near and it is short."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.55)
    if near:
        return f"; did you mean {' or '.join(repr(n) for n in near)}?"
    return f"; known: {', '.join(choices)}" if 0 < len(choices) <= _SHORT else ""
