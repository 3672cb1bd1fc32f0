"""`number`: the last number of the response is the answer.

Understands signs (ASCII and U+2212), thousands commas, decimals, exponents and fractions written
`3/4`. A hyphen after an operand is an operator, not a sign: the last number of `10-3` is 3.
"""

from __future__ import annotations

import re
from decimal import Context, Decimal, DecimalException

from tokenloom.tasks.item import Item

# Possessive quantifiers and bounded exponents keep a scan linear in the length of any text, which
# is why this verifier may run without a process around it.
_NUMBER = re.compile(
    r"(?P<sign>(?<![0-9A-Za-z_.)\]}])[-+])?[$€£]?"
    r"(?P<top>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]++)(?:\.[0-9]++)?|(?<![0-9])\.[0-9]++)"
    r"(?P<exponent>[eE][-+]?[0-9]{1,4}(?![0-9]))?"
    r"(?:/(?P<bottom>[0-9]++)(?!/|\.[0-9]))?"
)
_FIFTY_DIGITS = Context(prec=50)


def verify(response: str, item: Item, *, tolerance: float = 0.0) -> tuple[float, str | None]:
    """1 if the last number of the response equals the last number of `str(item.answer)`, else 0.

    Comparison is of exact decimals (fractions to 50 digits); `tolerance` is the absolute difference
    allowed. The parsed answer is the number as text, None if there is none.

    Raises:
        ValueError: when the expected answer holds no number.
    """
    if item.answer is None:
        return 0.0, last_number(response)
    expected_text = last_number(str(item.answer))
    expected = None if expected_text is None else value_of(expected_text)
    if expected is None:
        raise ValueError(f"the expected answer {str(item.answer)[:80]!r} holds no number")
    answer = last_number(response)
    value = None if answer is None else value_of(answer)
    if value is None:
        return 0.0, answer
    if value == expected:
        return 1.0, answer
    try:
        close = _FIFTY_DIGITS.subtract(value, expected).copy_abs() <= Decimal(tolerance)
    except DecimalException:
        return 0.0, answer
    return float(close), answer


def last_number(text: str) -> str | None:
    """The last number of a text without commas, currency or a plus sign, such as `-1234.5` or `3/4`."""
    text = text.replace("\u2212", "-")
    last: re.Match[str] | None = None
    for match in _NUMBER.finditer(text):
        last = match
    if last is None:
        return None
    sign, top, exponent, bottom = last.group("sign", "top", "exponent", "bottom")
    if bottom is not None and text[last.start() - 1 : last.start()] == "/":
        return bottom  # the end of a date or a path such as 1/2/2024, not a fraction
    number = ("-" if sign == "-" else "") + top.replace(",", "") + (exponent or "")
    return number if bottom is None else f"{number}/{bottom}"


def value_of(number: str) -> Decimal | None:
    """The value of what `last_number` returned; None for a division by zero."""
    top, slash, bottom = number.partition("/")
    try:
        return _FIFTY_DIGITS.divide(Decimal(top), Decimal(bottom)) if slash else Decimal(top)
    except DecimalException:
        return None
