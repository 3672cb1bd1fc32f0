"""Banned strings in a growing text: phrases between word boundaries, n-grams without stop words, regexes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tokenloom.methods.decoding.antislop import STOP_WORDS, WORD


@dataclass(frozen=True, order=True)
class Found:
    """An occurrence: where it starts and ends (characters), what was banned, and its scale (0: not at all)."""

    start: int
    end: int
    what: str
    scale: float = 0.0


class Bans:
    """What must not be said; phrases with a scale above 0 are only made rarer."""

    def __init__(
        self,
        phrases: Iterable[str] | Mapping[str, float] = (),
        ngrams: Iterable[str | Sequence[str]] = (),
        patterns: Iterable[str] = (),
        stop_words: Iterable[str] = STOP_WORDS,
    ) -> None:
        """Phrases and n-grams in any case. An n-gram is text or a sequence of words.

        Raises:
            ValueError: for an empty phrase or n-gram, a scale outside [0, 1), or a pattern that is none.
        """
        if isinstance(phrases, str) or isinstance(patterns, str) or isinstance(ngrams, str):
            raise ValueError("bans are lists of texts; put a single one into a list")
        given = phrases if isinstance(phrases, Mapping) else dict.fromkeys(phrases, 0.0)
        self.phrases = {lowered(p): float(scale) for p, scale in given.items()}
        if any(not p.strip() or not 0 <= scale < 1 for p, scale in self.phrases.items()):
            raise ValueError("a banned phrase must have letters, and its scale lie in [0, 1); 0 bans it altogether")
        self._lengths = sorted({len(p) for p in self.phrases})
        self._stop_words = frozenset(stop_words)
        self._ngrams = {self._cleaned(g) for g in ngrams}
        if () in self._ngrams:
            raise ValueError("a banned n-gram has no words besides stop words")
        try:
            self._patterns = [re.compile(p, re.IGNORECASE) for p in patterns]
        except re.error as error:
            raise ValueError(f"a banned pattern is no regular expression: {error}") from error

    def __bool__(self) -> bool:
        return bool(self.phrases or self._ngrams or self._patterns)

    def found(self, text: str, since: int = 0) -> list[Found]:
        """Occurrences in `text` that end behind character `since`, the earliest first, the shortest of equal starts."""
        low = lowered(text)
        return sorted({*self._phrases_in(low, since), *self._ngrams_in(low, since), *self._matches(text, since)})

    def _phrases_in(self, text: str, since: int) -> Iterator[Found]:
        for length in self._lengths:
            for start in range(max(0, since - length + 1), len(text) - length + 1):
                phrase = text[start : start + length]
                if phrase in self.phrases and self._stands_alone(text, start, start + length):
                    yield Found(start, start + length, phrase, self.phrases[phrase])

    @staticmethod
    def _stands_alone(text: str, start: int, end: int) -> bool:
        """No word goes on across an edge of the phrase; an edge that is no word character needs nothing.

        The end of the text is a boundary: what comes is not known, as in the release.
        """
        left = start == 0 or not _in_word(text[start]) or not _in_word(text[start - 1])
        return left and (end == len(text) or not _in_word(text[end - 1]) or not _in_word(text[end]))

    def _ngrams_in(self, text: str, since: int) -> Iterator[Found]:
        if not self._ngrams:
            return
        words = [m for m in WORD.finditer(text) if m.group() not in self._stop_words]
        for n in {len(g) for g in self._ngrams}:
            for i in range(len(words) - n + 1):
                gram = tuple(m.group() for m in words[i : i + n])
                if words[i + n - 1].end() > since and gram in self._ngrams:
                    yield Found(words[i].start(), words[i + n - 1].end(), " ".join(gram))

    def _matches(self, text: str, since: int) -> Iterator[Found]:
        for pattern in self._patterns:
            for match in pattern.finditer(text):
                if match.end() > max(since, match.start()):
                    yield Found(match.start(), match.end(), f"/{pattern.pattern}/")

    def _cleaned(self, ngram: str | Sequence[str]) -> tuple[str, ...]:
        words = WORD.findall(lowered(ngram if isinstance(ngram, str) else " ".join(ngram)))
        return tuple(w for w in words if w not in self._stop_words)


def lowered(text: str) -> str:
    """The text in lower case, character by character, so that positions stay."""
    low = text.lower()
    return low if len(low) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _in_word(character: str) -> bool:
    """Letters, digits and marks of any script."""
    return unicodedata.category(character)[0] in "LNM"
