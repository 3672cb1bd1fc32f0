"""Reading JSON lines that a crash may have cut short."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_objects(path: Path, notes: list[str], consequence: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (byte offset, object) of every readable line, in file order; never raises on content.

    What could not be read is appended to `notes` once the file is exhausted: a missing or empty
    file together with `consequence` (what the reader of the page will not find), a torn last line
    (no line end: the writer was killed), other unreadable lines by count and first line number.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: {consequence}.")
        return
    except OSError as error:
        notes.append(f"{path.name} cannot be opened ({error.strerror}): {consequence}.")
        return
    bad: list[int] = []
    good = offset = 0
    torn = False
    with file:
        for number, line in enumerate(file, 1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            found = parse_object(line)
            if found is not None:
                good += 1
                yield start, found
            elif line.endswith(b"\n"):
                bad.append(number)
            else:
                torn = True
    if torn:
        notes.append(f"{path.name}: the last line is torn (the writer stopped in the middle of it); ignored.")
    if bad:
        lines = "1 line" if len(bad) == 1 else f"{len(bad)} lines"
        notes.append(f"{path.name}: {lines} unreadable, ignored (first: line {bad[0]}).")
    if not good and not torn and not bad:
        notes.append(f"{path.name} is empty: {consequence}.")


def parse_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object on `line`, or None when it is not one."""
    try:
        value = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def number(value: Any) -> float | None:
    """`value` as a finite float; None for everything else (text, null, NaN, infinity, huge integers)."""
    if not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None
