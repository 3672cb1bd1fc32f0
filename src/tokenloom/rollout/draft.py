"""Drafts from what a group has already written: n-gram look-up.

After the tokens ... a b c, the draft is what followed the latest earlier `a b c` (or else `b c`) in the row's own
prompt and response or in another response to the same prompt. A draft is only a guess at what the row will sample:
see `decode`, where a wrong one costs computation and changes nothing.

The idea is prompt look-up (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding) and REST
(arXiv:2311.08252), with the group as the datastore. Fidelity: reconstructed; the back-off is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Places = dict[tuple[int, ...], tuple[list[int], int]]
_LONGEST, _SHORTEST = 3, 2


@dataclass
class _Row:
    text: list[int]
    places: Places
    length: int
    draft: list[int] = field(default_factory=list)
    misses: int = 0
    pause: int = 0


class GroupDrafts:
    """Drafts of at most `most` tokens for rows with `prompts`; rows with the same prompt learn from each other.

    A row's drafts grow by a token when all of the last came true and shrink to what came true otherwise; after m
    drafts in a row of which nothing did, it pauses for 2^m steps. So text that does not repeat costs little.
    """

    def __init__(self, prompts: Sequence[tuple[int, ...]], most: int) -> None:
        self._most = most
        places: dict[tuple[int, ...], Places] = {}
        self._rows = []
        for prompt in prompts:
            row = _Row(list(prompt), places.setdefault(prompt, {}), most)
            if not row.places:
                for end in range(len(prompt)):
                    _note(row.places, row.text, end)
            self._rows.append(row)

    def propose(self, number: int, room: int) -> list[int]:
        """At most `room` tokens that may come next in row `number`."""
        row = self._rows[number]
        row.draft = []
        if row.pause:
            row.pause -= 1
            return []
        for n in range(_LONGEST, _SHORTEST - 1, -1):
            found = row.places.get(tuple(row.text[-n:]))
            if found is not None:
                source, start = found
                row.draft = source[start : start + min(room, row.length)]
                break
        return row.draft

    def learn(self, added: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Rows and the tokens that they have sampled since they were asked for a draft."""
        for number, tokens in added:
            row = self._rows[number]
            for token in tokens:
                row.text.append(token)
                _note(row.places, row.text, len(row.text) - 1)
            if row.draft:
                right = sum(guess == token for guess, token in zip(row.draft, tokens, strict=False))
                row.length = min(right + 1, self._most)
                row.misses = 0 if right else row.misses + 1
                row.pause = 0 if right else 2**row.misses
                row.draft = []


def _note(places: Places, text: list[int], end: int) -> None:
    """`text[end]` followed the n-grams before it."""
    for n in range(_SHORTEST, min(_LONGEST, end) + 1):
        places[tuple(text[end - n : end])] = (text, end)
