"""`math`: mathematical equivalence as math-verify judges it (LaTeX, plain expressions, sets, intervals).

Runs in a worker process: symbolic simplification may never end. math-verify's own alarm is turned
off, since the pool kills the process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from tokenloom.tasks.item import Item


def verify(response: str, item: Item, *, strict: bool = True) -> tuple[float, str | None]:
    """1 if the response's final expression equals that of `str(item.answer)`, else 0.

    `strict` distinguishes variables by name and sets from tuples. The parsed answer is the text
    that math-verify extracted.

    Raises:
        ValueError: when the expected answer holds no expression.
    """
    parse, equivalent = _library()
    target = parse(response, parsing_timeout=None)
    answer = str(target[-1]) if target else None
    if item.answer is None:
        return 0.0, answer
    text = str(item.answer).strip()
    gold: list[Any] = []
    for written in (text, f"${text}$"):
        gold = gold or parse(written, parsing_timeout=None)
    if not gold:
        raise ValueError(f"the expected answer {text[:80]!r} holds no mathematical expression")
    return float(bool(target) and equivalent(gold, target, strict=strict, timeout_seconds=None)), answer


def prepare() -> None:
    """Imports math-verify and lets it build its patterns.

    Raises:
        ValueError: when it is not installed.
    """
    parse, equivalent = _library()
    equivalent(parse("$1$", parsing_timeout=None), parse("1", parsing_timeout=None), timeout_seconds=None)


def _library() -> tuple[Callable[..., list[Any]], Callable[..., bool]]:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ValueError("verifier 'math' needs the package math-verify: pip install math-verify") from error
    # It warns of the missing alarm, which the pool replaces.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse, verify
