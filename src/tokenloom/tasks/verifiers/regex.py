"""`regex`: a pattern says where in the response the answer stands.

Runs in a worker process: a pattern may need exponential time, and only killing stops it.
"""

from __future__ import annotations

import re

from tokenloom.tasks.item import Item


def verify(
    response: str,
    item: Item,
    *,
    pattern: str,
    group: int = 1,
    last: bool = True,
    ignore_case: bool = False,
) -> tuple[float, str | None]:
    """1 if what `pattern` captures equals `str(item.answer)`, both stripped; else, or if nothing matches, 0.

    `group` is the capture (the whole match when the pattern has none); `last` takes the last match
    rather than the first; `ignore_case` holds for the pattern and for the comparison.

    Raises:
        ValueError: when the pattern lacks the group.
    """
    compiled = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    number = group if compiled.groups else 0
    if not 0 <= number <= compiled.groups:
        raise ValueError(f"the pattern has {compiled.groups} groups, there is no group {group}")
    found: str | None = None
    for match in compiled.finditer(response):
        found = match.group(number)
        if not last:
            break
    if found is None:
        return 0.0, None
    answer = found.strip()
    if item.answer is None:
        return 0.0, answer
    expected = str(item.answer).strip()
    same = answer.casefold() == expected.casefold() if ignore_case else answer == expected
    return float(same), answer
