"""Antislop as a loop: what is banned is taken back to the token where it began, and something else is drawn there.

    loop = decode.loop("antislop", tokenizer=tokenizer, phrases=["a testament to"], patterns=[r"not just .*? but"])

Every row goes back on its own. After each token the new end of the text is searched. Where a banned string is found,
the token that holds its first character is excluded at its place and another drawn from the law that was kept there.
When none is left, temperature, min-p, top-p and top-k are dropped in that order; when still none is left, or after
`retries` at one place, this occurrence is allowed. `phrases` with scales in (0, 1) are made rarer by scale^strength
instead. Matching is in `decode.bans`, the laws and the training loss in `methods.decoding.antislop`; `decode.ftpo`
trains a model on the places where the sampler went back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tokenloom.decode.bans import Bans, Found
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Loop, Run
from tokenloom.methods.decoding.antislop import down_weighted, without_tried

_CASCADE = (TemperatureLogitsWarper, MinPLogitsWarper, TopPLogitsWarper, TopKLogitsWarper)
# Alternatives of a place are drawn from what the release keeps of a law: its top 20, with 3% of the best one's mass.
_ALTERNATIVES, _LIKELY = 20, 0.03


@dataclass(frozen=True)
class Correction:
    """A place where the sampler went back: training examples for `antislop/ftpo` (see `decode.ftpo.pairs_of`)."""

    prefix: list[int]
    rejected: list[int]
    chosen: int
    alternatives: list[int] = field(default_factory=list)
    """Other likely tokens, the likeliest first, that complete nothing banned there."""


@decoder("antislop", kind="loop")
class Antislop(Loop):
    """No banned phrase, n-gram or pattern; `phrases` may map each to a scale, 0 for never.

    `history`: how many tokens back the laws are kept; what began earlier is allowed. `corrections` lists, after a call,
    where it went back and found something else to say.
    """

    corrections: list[Correction]

    def __init__(
        self,
        tokenizer: Any,
        phrases: Any = (),
        ngrams: Any = (),
        patterns: Any = (),
        *,
        strength: float = 1.0,
        retries: int = 100,
        history: int = 256,
    ) -> None:
        if strength < 0 or retries < 1 or history < 1:
            raise ValueError("antislop: strength must be 0 or more, retries and history 1 or more")
        self.tokenizer, self.bans = tokenizer, Bans(phrases, ngrams, patterns)
        self.strength, self.retries, self.history = strength, retries, history

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        run.counts |= {"backtracks": 0.0, "allowed": 0.0}
        states = [_Row(self, run, number) for number in range(len(run))]
        live = list(range(len(run)))
        with run.session() as session:
            scores = session.start()
            while True:
                running = []
                for place, row in enumerate(live):
                    if not states[row].advance(scores[place]):
                        running.append(place)
                if not running:
                    break
                if len(running) < len(live):
                    session.branch(running)
                live = [live[i] for i in running]
                ids = [states[r].ids for r in live]
                session.crop([len(run.prompts[r]) + len(new) - 1 for r, new in zip(live, ids, strict=True)])
                scores = session.step(torch.tensor([new[-1] for new in ids]))
        for row, state in enumerate(states):
            run.stream(row, state.ids)
        self.corrections = [c for state in states for c in state.corrections()]
        return [state.ids for state in states]


@dataclass
class _Place:
    """What is known of one place of a response, under the tokens before it."""

    at: int
    scores: Tensor
    tried: list[int] = field(default_factory=list)
    factors: dict[int, float] = field(default_factory=dict)
    allowed: set[str] = field(default_factory=set)
    open: bool = False
    """Nothing else can stand here: whatever begins here is allowed."""


class _Row:
    """One response that grows and shrinks."""

    def __init__(self, method: Antislop, run: Run, number: int) -> None:
        self.method, self.run, self.number = method, run, number
        self.ids: list[int] = []
        self._ends: list[int] = []  # characters of the text up to and with each token
        self._places: dict[int, _Place] = {}
        self._retries: dict[int, int] = {}
        self._settled: list[Correction] = []  # of places that have left the history
        self._laws = [replace(run, processors=p) for p in _cascade(run.processors)]

    def advance(self, scores: Tensor) -> bool:
        """Add a token behind those that stand, going back as often as needed; whether the row has ended."""
        self._places[len(self.ids)] = _Place(len(self.ids), scores)
        if (old := self._places.pop(len(self.ids) - self.method.history, None)) is not None:
            self._settled += self._corrected(old)
        while True:
            at = len(self.ids)
            token = self._choose(self._places[at])
            before = self._ends[-1] if self._ends else 0
            self.ids.append(token)
            text = self._text(self.ids)
            self._ends.append(len(text))
            if not self._took_back(text, before):
                return self.run.until_stop(self.number, self.ids[:-1], [token])[1]

    def corrections(self) -> list[Correction]:
        """The places that still stand where another token was rejected."""
        standing = [place for at, place in sorted(self._places.items()) if at < len(self.ids)]
        return [*self._settled, *(c for place in standing for c in self._corrected(place))]

    def _corrected(self, place: _Place) -> list[Correction]:
        # Where something banned was allowed in the end, what stands is no better than what was rejected.
        if not place.tried or place.open or place.allowed:
            return []
        before, chosen = self.ids[: place.at], self.ids[place.at]
        prefix = [*self.run.prompts[self.number], *before]
        return [Correction(prefix, place.tried, chosen, self._alternatives(place, before, chosen))]

    def _alternatives(self, place: _Place, before: list[int], chosen: int) -> list[int]:
        laws = (self._scores(place, run).softmax(-1) for run in self._laws)
        law = next(law for law in laws if bool(law.isfinite().all()))
        masses, ids = law.sort(descending=True, stable=True)
        likely = ids[:_ALTERNATIVES][masses[:_ALTERNATIVES] >= _LIKELY * masses[0]].tolist()
        end = len(self._text(before))
        return [t for t in likely if t != chosen and not self.method.bans.found(self._text([*before, t]), end)]

    def _text(self, ids: list[int]) -> str:
        found: str = self.method.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # A character may be spread over tokens: until it is whole it is not text.
        return found.rstrip("�")

    def _took_back(self, text: str, before: int) -> bool:
        for found in self.method.bans.found(text, min(before, len(text))):
            at = next(i for i, end in enumerate(self._ends) if end > found.start)
            place = self._places.get(at)
            if place is None or place.open or self._retries.get(at, 0) >= self.method.retries:
                self._allow(place, found)
            elif found.what not in place.allowed:
                if self._differs(place, self.ids[at], found):
                    self._back_to(at)
                    return True
                self._allow(place, found)
        return False

    def _differs(self, place: _Place, token: int, found: Found) -> bool:
        """Note what is to be avoided at a place; whether something else is to be drawn there."""
        if not found.scale:
            place.tried.append(token)
            return True
        for begin in {token, *_beginnings(self.method.tokenizer, found.what)}:
            place.factors[begin] = place.factors.get(begin, 1.0) * found.scale**self.method.strength
        return int(self._scores(place, self._laws[0]).argmax()) != token

    def _allow(self, place: _Place | None, found: Found) -> None:
        if place is None or found.what not in place.allowed:
            self.run.counts["allowed"] += 1
        if place is not None:
            place.allowed.add(found.what)

    def _back_to(self, at: int) -> None:
        self.run.counts["backtracks"] += 1
        self._retries[at] = self._retries.get(at, 0) + 1
        del self.ids[at:], self._ends[at:]
        self._places = {i: p for i, p in self._places.items() if i <= at}

    def _choose(self, place: _Place) -> int:
        for run in self._laws if place.tried else self._laws[:1]:
            scores = self._scores(place, run)
            if bool((scores > -torch.inf).any()):
                return self.run.draw.categorical(scores.softmax(-1)) if self.run.sample else int(scores.argmax())
        place.open = True
        return place.tried[0]

    def _scores(self, place: _Place, run: Run) -> Tensor:
        """Processed scores [V] at a place, less what was learned there."""
        scores = run.shaped([self.number], [self.ids[: place.at]], place.scores[None])
        if place.factors:
            factors = torch.ones_like(scores)
            factors[0, list(place.factors)] = torch.tensor(list(place.factors.values())).to(scores)
            scores = down_weighted(scores, factors)
        if place.tried:
            tried = torch.zeros_like(scores, dtype=torch.bool)
            tried[0, place.tried] = True
            scores = without_tried(scores, tried)
        return scores[0]


def _cascade(processors: Sequence[Any]) -> list[list[Any]]:
    """The processors, then without temperature, without min-p too, without top-p, without top-k."""
    levels = [list(processors)]
    for kind in _CASCADE:
        fewer = [p for p in levels[-1] if not isinstance(p, kind)]
        if len(fewer) < len(levels[-1]):
            levels.append(fewer)
    return levels


def _beginnings(tokenizer: Any, phrase: str) -> set[int]:
    """Tokens that a phrase may begin with: in three cases, with and without a space, whole and cut off anywhere."""
    found: set[int] = set()
    for text in (phrase, phrase.capitalize(), phrase.upper()):
        for variant in (text, f" {text}"):
            for length in range(1, len(variant) + 1):
                ids = tokenizer.encode(variant[:length], add_special_tokens=False)
                if ids and (len(ids) == 1 or length == len(variant)):
                    found.add(int(ids[0]))
    return {token for token in found if tokenizer.decode([token]).strip()}
