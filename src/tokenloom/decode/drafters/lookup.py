"""Drafters that look up what followed the same tokens before: in the row itself, or in all rows of its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tokenloom.decode.drafters.base import EMPTY, Ask, Drafter
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Run
from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree
from tokenloom.methods.decoding.prompt_lookup import continued


class NGramPlaces:
    """For n-grams of several texts, the latest place behind one."""

    def __init__(self, longest: int, shortest: int) -> None:
        self.longest, self.shortest = longest, shortest
        self._places: dict[tuple[int, ...], tuple[list[int], int]] = {}

    def note(self, text: list[int], end: int) -> None:
        """Token `end` of `text` follows the n-grams before it."""
        for n in range(self.shortest, min(self.longest, end) + 1):
            self._places[tuple(text[end - n : end])] = (text, end)

    def find(self, text: list[int]) -> tuple[int, list[int], int]:
        """The length of the longest known suffix of `text`, 0 for none, the text where it stood, and what is behind."""
        for n in range(min(self.longest, len(text)), self.shortest - 1, -1):
            found = self._places.get(tuple(text[-n:]))
            if found is not None:
                return n, *found
        return 0, text, len(text)


@decoder("prompt-lookup", kind="drafter")
class PromptLookup(Drafter):
    """What followed the last `longest` ... `shortest` tokens before, in the same row."""

    slug = "prompt-lookup"
    guess = (0.5,)

    def __init__(self, *, longest: int = 3, shortest: int = 1, drafts: int = 10) -> None:
        if not 1 <= shortest <= longest or drafts < 1:
            raise ValueError(
                f"{self.slug}: needs 1 <= shortest <= longest and drafts >= 1; got {shortest}, {longest}, {drafts}"
            )
        self._longest, self._shortest = longest, shortest
        self.keys, self.depth = longest, drafts
        self._places: list[NGramPlaces] = []
        self._read: list[int] = []

    @contextmanager
    def open(self, run: Run) -> Iterator[None]:
        """See `Drafter`."""
        self._places = self._per_row(run.prompts)
        self._read = [1] * len(run)
        yield

    def _per_row(self, prompts: Sequence[Sequence[int]]) -> list[NGramPlaces]:
        return [NGramPlaces(self._longest, self._shortest) for _ in prompts]

    def key(self, row: int, text: list[int]) -> int | None:
        """See `Drafter`: the length of the match."""
        for end in range(self._read[row], len(text)):
            self._places[row].note(text, end)
        self._read[row] = len(text)
        n, _, _ = self._places[row].find(text)
        return n - 1 if n else None

    def draft(self, asks: Sequence[Ask]) -> list[DraftTree]:
        """See `Drafter`."""
        return [self._chain(ask) if len(ask.shape) else EMPTY for ask in asks]

    def _chain(self, ask: Ask) -> DraftTree:
        _, source, start = self._places[ask.row].find(ask.text)
        count = len(ask.shape)
        # Another row's text ends where it ends; one's own goes on with the draft.
        tokens = continued(source, start, count) if source is ask.text else source[start : start + count]
        return DraftTree(tokens, [ROOT, *range(len(tokens) - 1)] if tokens else [])


@decoder("group-ngrams", kind="drafter")
class GroupNGrams(PromptLookup):
    """What followed the same tokens in any row of the same prompt, the latest first."""

    slug = "group-ngrams"

    def _per_row(self, prompts: Sequence[Sequence[int]]) -> list[NGramPlaces]:
        shared: dict[tuple[int, ...], NGramPlaces] = {}
        return [shared.setdefault(tuple(p), NGramPlaces(self._longest, self._shortest)) for p in prompts]
