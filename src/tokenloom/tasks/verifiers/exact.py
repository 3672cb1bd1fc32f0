"""`exact`: the whole response, stripped of blanks around it, is the answer."""

from __future__ import annotations

from tokenloom.tasks.item import Item


def verify(response: str, item: Item, *, case_sensitive: bool = True, strip: bool = True) -> tuple[float, str]:
    """1 if the response equals `str(item.answer)`, else 0; by default stripped and with case."""
    answer = response.strip() if strip else response
    if item.answer is None:
        return 0.0, answer
    expected = str(item.answer)
    expected = expected.strip() if strip else expected
    same = answer == expected if case_sensitive else answer.casefold() == expected.casefold()
    return float(same), answer
