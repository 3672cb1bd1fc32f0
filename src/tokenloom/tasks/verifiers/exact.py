"""`exact`: the whole response, stripped of blanks around it, is the answer."""

from __future__ import annotations

from tokenloom.tasks.item import Item


def verify(response: str, item: Item, *, case_sensitive: bool = True, strip: bool = True) -> tuple[float, str]:
    """1 if the response equals `str(item.answer)`, else 0; by default stripped and with case.

    Raises:
        ValueError: when the item has no answer.
    """
    if item.answer is None:
        raise ValueError("the item has no `answer` to compare with")
    expected = str(item.answer)
    answer = response.strip() if strip else response
    expected = expected.strip() if strip else expected
    same = answer == expected if case_sensitive else answer.casefold() == expected.casefold()
    return float(same), answer
