"""`choice`: multiple choice; the letter that the response settles on is the answer."""

from __future__ import annotations

import re
from functools import lru_cache

from tokenloom.tasks.item import Item


def verify(response: str, item: Item, *, letters: str = "ABCDE") -> tuple[float, str | None]:
    """1 if the response's letter is the letter of `str(item.answer)`, else 0; None if it has no letter.

    The letter is, in this order: a response that is one letter, with or without brackets or a
    period; the last letter after "answer" (an "is" or a colon between) or inside `\\boxed{}`; one
    that opens the response as `C.`, `C)` or `(C)`; the last bracketed one; the last capital letter
    that stands alone and does not read like the words "A" or "I".

    Raises:
        ValueError: when the expected answer holds none of `letters`.
    """
    if item.answer is None:
        return 0.0, pick(response, letters)
    expected = pick(str(item.answer), letters)
    if expected is None:
        raise ValueError(f"the expected answer {str(item.answer)[:80]!r} holds none of the letters {letters}")
    answer = pick(response, letters)
    return float(answer == expected), answer


def pick(text: str, letters: str = "ABCDE") -> str | None:
    """The upper-case letter that a text settles on, None if it settles on none of `letters`."""
    text = text.strip()
    for pattern in _patterns(letters.upper()):
        found = pattern.findall(text)
        if found:
            return str(found[-1]).upper()
    return None


@lru_cache(maxsize=32)
def _patterns(letters: str) -> tuple[re.Pattern[str], ...]:
    # Repetitions are bounded, so that the time stays linear in any text.
    upper, alone = f"[{re.escape(letters)}]", r"(?![\w'])"
    either = f"[{re.escape(letters)}{re.escape(letters.lower())}]"
    said = r"(?i:answer)\W{0,4}(?:(?i:is|would be)\W{0,4})?"
    boxed = r"\\boxed\{(?:\\text\{)?\W?"
    return (
        re.compile(rf"\A[(\[*]{{0,3}}({either})[)\]*.:]{{0,4}}\Z"),
        re.compile(rf"(?:{said}(?:{boxed})?|{boxed})({upper}){alone}"),
        re.compile(rf"\A[(\[]?({upper})(?:[)\].:\n]|\Z)"),
        re.compile(rf"[(\[]({upper})[)\]]"),
        re.compile(rf"(?<![\w'])(?![AI] [a-z])({upper}){alone}"),
    )
