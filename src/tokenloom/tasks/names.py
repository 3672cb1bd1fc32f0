"""Messages about unknown names, with the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: str, known: Iterable[str], *, limit: int = 12) -> str:
    """One sentence: the unknown name, the nearest known one, and the known names (at most `limit`)."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if len(names) > limit:
        close = difflib.get_close_matches(name, names, n=limit, cutoff=0.3)
        listed = f" ({len(names)} known; nearest: {', '.join(close)})" if close else f" ({len(names)} known)"
    else:
        listed = f" (known: {', '.join(names)})" if names else " (none is known)"
    return f"unknown {kind} {name!r}{hint}{listed}"
