"""Segment search: one loop that proposes, grows, scores and selects pieces of text. Beams, best-of-N, blockwise and
tree search are presets of it, each a choice of five things.

    propose(live)         the first tokens of the candidates that follow each live hypothesis
    boundary(candidate)   whether its segment ends here; until then tokens are drawn by `tokens`, as `generate` would
    score(candidates)     a number for each new candidate, all prompts at once
    select(candidates)    the hypotheses of one prompt that stay, best first
    width                 the most live hypotheses that a prompt may keep

A round takes every live hypothesis of every prompt one segment further. Segments may differ in length: an end token,
the length limit and stopping criteria cut a candidate before it is scored. `select` sees what its pool has become:
each done hypothesis at its old place, and instead of each live one its candidates. The search of a prompt ends when
nothing in its pool is live. One session holds all prompts; its rows are branched and cropped to where hypotheses
stand, so that a token is read again only where a candidate returns whose row has been given to another.

Letters: N hypotheses, V vocabulary, D hidden size.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenloom.decode.run import Loop, Run
from tokenloom.decode.session import Session
from tokenloom.decode.shapers import wide


class Choice(NamedTuple):
    """A token that a hypothesis may go on with."""

    token: int
    logprob: float
    """Under the law that `generate` draws from, processors included (nats)."""
    note: float = 0.0
    """One more number that is kept with the token; drawn tokens note their log-prob under the model alone."""


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """New ids of one prompt, and what is known about them."""

    row: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    notes: tuple[float, ...] = ()
    done: bool = False
    score: float = 0.0
    parent: Hypothesis | None = None
    """What the last segment was added to; its own parent is forgotten."""
    scores: Tensor | None = None
    """[V] of the next token, raw, once the model has read the last one."""
    hidden: Tensor | None = None
    """[D], last layer at the last token, in a search with `hidden`."""

    @property
    def key(self) -> tuple[int, tuple[int, ...]]:
        """Prompt and ids."""
        return self.row, self.tokens

    @property
    def begin(self) -> int:
        """Where the last segment begins."""
        return 0 if self.parent is None else len(self.parent.tokens)


Propose = Callable[[list[Hypothesis]], list[list[Choice]]]
Boundary = Callable[[Hypothesis], bool]
Score = Callable[[list[Hypothesis]], Sequence[float]]
Select = Callable[[list[Hypothesis]], list[Hypothesis]]
Tokens = Callable[[Run, Sequence[Hypothesis], Sequence[int]], list[list[Choice]]]
"""So many tokens after each hypothesis, as `draws`."""


def draws(run: Run, live: Sequence[Hypothesis], counts: Sequence[int]) -> list[list[Choice]]:
    """`counts[i]` independent tokens after hypothesis i, by the law of `generate`; without sampling one, the best."""
    stacked = _stacked(live)
    shaped = run.shaped([h.row for h in live], [h.tokens for h in live], stacked)
    logprobs, raw = shaped.log_softmax(-1), wide(stacked).log_softmax(-1)
    laws = shaped.softmax(-1) if run.sample else None
    best = shaped.argmax(-1).tolist()
    drawn = [
        [best[i]] if laws is None else [run.draw.categorical(laws[i]) for _ in range(count)]
        for i, count in enumerate(counts)
    ]
    rows = [i for i, tokens in enumerate(drawn) for _ in tokens]
    columns = [t for tokens in drawn for t in tokens]
    choices = map(Choice, columns, logprobs[rows, columns].tolist(), raw[rows, columns].tolist())
    return [[next(choices) for _ in tokens] for tokens in drawn]


def segment_search(
    run: Run,
    *,
    propose: Propose,
    boundary: Boundary,
    score: Score,
    select: Select,
    width: int,
    tokens: Tokens = draws,
    ahead: bool = False,
    hidden: bool = False,
) -> list[list[Hypothesis]]:
    """The last pool of each prompt, as `select` left it.

    With `ahead` the model reads each token before `boundary` and `score` see the candidate, which then has `scores`
    (and `hidden`), and `select` may give back a candidate's `parent`, to be extended anew.

    Raises:
        ValueError: for a width below 1, when `select` keeps more live hypotheses, or when nothing can follow.
    """
    if width < 1:
        raise ValueError(f"a search keeps at least one hypothesis; got width={width}")
    pools = [[Hypothesis(row)] for row in range(len(run))]
    options: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
    with run.session(**options) as session:
        frontier = _Frontier(run, session, hidden)
        while live := [h for pool in pools for h in pool if not h.done]:
            live = frontier.read(live)
            families = [
                [_extended(run, parent, choice, begins=True) for choice in choices]
                for parent, choices in zip(live, propose(live), strict=True)
            ]
            slots = [child for family in families for child in family]
            grown = _grow(run, frontier, slots, boundary, tokens, ahead)
            scored = iter([dataclasses.replace(h, score=float(s)) for h, s in zip(grown, score(grown), strict=True)])
            sizes = iter([len(family) for family in families])
            for row, pool in enumerate(pools):
                if all(h.done for h in pool):
                    continue
                candidates: list[Hypothesis] = []
                for h in pool:
                    candidates += [h] if h.done else [next(scored) for _ in range(next(sizes))]
                if not candidates:
                    raise ValueError(f"prompt {row}: the processors leave no token that could follow; loosen one")
                # What has ended is kept without its tensors.
                pools[row] = [
                    dataclasses.replace(h, parent=None, scores=None, hidden=None) if h.done else h
                    for h in select(candidates)
                ]
                kept = sum(not h.done for h in pools[row])
                if kept > width:
                    raise ValueError(f"select kept {kept} live hypotheses of prompt {row}, more than width={width}")
            run.counts["candidates"] = run.counts.get("candidates", 0.0) + len(grown)
            if run.streamer is not None:
                shown = int(run.counts.get("streamed", 0.0))
                agreed = common_prefix(pools[0])
                run.stream(0, agreed[shown:])
                run.counts["streamed"] = float(len(agreed))
    return pools


def best_first(candidates: Sequence[Hypothesis]) -> list[Hypothesis]:
    """By falling score; the first among equals stays first."""
    return sorted(candidates, key=lambda h: -h.score)


def common_prefix(pool: Sequence[Hypothesis]) -> tuple[int, ...]:
    """The ids that all hypotheses of a pool begin with."""
    shared = pool[0].tokens
    for h in pool[1:]:
        shared = shared[: _common(shared, h.tokens)]
    return shared


class SearchLoop(Loop):
    """Base of loops that search: subclasses write `search`, and `answer` where it is not the first of the pool."""

    @abstractmethod
    def search(self, run: Run) -> list[list[Hypothesis]]:
        """The last pools, by `segment_search`."""

    def answer(self, run: Run, pool: list[Hypothesis]) -> Hypothesis:
        """The hypothesis that a prompt's last pool gives."""
        return pool[0]

    def rows(self, run: Run) -> list[list[int]]:
        """See `Loop`."""
        answers = [self.answer(run, pool) for pool in self.search(run)]
        run.stream(0, answers[0].tokens[int(run.counts.pop("streamed", 0.0)) :])
        return [list(h.tokens) for h in answers]


class _Frontier:
    """Brings the rows of a session to where hypotheses stand."""

    def __init__(self, run: Run, session: Session, hidden: bool) -> None:
        self._run, self._session, self._hidden = run, session, hidden
        self._rows: list[tuple[int, tuple[int, ...]]] = []

    def read(self, wanted: Sequence[Hypothesis], held: Sequence[Hypothesis] = ()) -> list[Hypothesis]:
        """`wanted` with their `scores`. Rows stay cached for them and, as far as they were read, for `held`."""
        if not self._rows:
            # The roots, one for each prompt.
            self._rows = [h.key for h in wanted]
            self._count()
            return [dataclasses.replace(h, scores=s) for h, s in zip(wanted, self._session.start(), strict=True)]
        new = [h for h in wanted if h.scores is None]
        if not new:
            return list(wanted)
        stay = [*new, *(h for h in wanted if h.scores is not None), *held]
        sources, shared = self._sources(stay)
        if sources != list(range(len(self._rows))):
            self._session.branch(sources)
        # A row gives scores only for what it reads now.
        shared[: len(new)] = [min(n, len(h.tokens) - 1) for n, h in zip(shared, new, strict=False)]
        self._rows = [(h.row, h.tokens[:n]) for h, n in zip(stay, shared, strict=True)]
        self._crop()
        missing = [h.tokens[n:] for h, n in zip(new, shared, strict=False)]
        if len(stay) == len(new) and all(len(m) == 1 for m in missing):
            scores = self._session.step(torch.tensor([m[0] for m in missing]))
        else:
            # Rows that nobody asks read a filler, which is taken back.
            scores = self._session.extend([*missing, *([(0,)] * (len(stay) - len(new)))])
        self._count()
        states = self._states(missing)
        fresh = iter([dataclasses.replace(h, scores=s, hidden=d) for h, s, d in zip(new, scores, states, strict=False)])
        self._rows[: len(new)] = [h.key for h in new]
        if len(stay) > len(new):
            self._crop()
        return [next(fresh) if h.scores is None else h for h in wanted]

    def _count(self) -> None:
        self._run.counts["forwards"] = self._run.counts.get("forwards", 0.0) + 1

    def _crop(self) -> None:
        lengths = [len(self._run.prompts[row]) + len(tokens) for row, tokens in self._rows]
        if lengths != [len(row) for row in self._session.rows]:
            self._session.crop(lengths)

    def _states(self, missing: Sequence[Sequence[int]]) -> Sequence[Tensor | None]:
        if not self._hidden:
            return [None] * len(missing)
        output: Any = getattr(self._session, "output", None)
        last = output.hidden_states[-1]
        return [last[i, len(m) - 1] for i, m in enumerate(missing)]

    def _sources(self, stay: Sequence[Hypothesis]) -> tuple[list[int], list[int]]:
        """For each hypothesis the session's row that shares most with it, and how many of its tokens."""
        place = {key: i for i, key in enumerate(self._rows)}
        sources, shared = [], []
        for h in stay:
            for n in (len(h.tokens), len(h.tokens) - 1):
                if (found := place.get((h.row, h.tokens[:n]))) is not None:
                    break
            else:
                near = [(_common(tokens, h.tokens), i) for i, (row, tokens) in enumerate(self._rows) if row == h.row]
                if not near:
                    raise ValueError(
                        f"nothing of prompt {h.row} is cached any more; a search whose select goes back to a parent "
                        "needs ahead=True"
                    )
                n, found = max(near, key=lambda pair: pair[0])
            sources.append(found)
            shared.append(n)
        return sources, shared


def _grow(
    run: Run, frontier: _Frontier, slots: list[Hypothesis], boundary: Boundary, tokens: Tokens, ahead: bool
) -> list[Hypothesis]:
    """Candidates of one token or more, taken to their boundaries."""
    growing = list(range(len(slots)))

    def read() -> None:
        held = [h for i, h in enumerate(slots) if i not in growing and (ahead or not h.done)]
        for i, h in zip(growing, frontier.read([slots[i] for i in growing], held), strict=True):
            slots[i] = h

    while growing:
        if ahead:
            read()
        growing = [i for i in growing if not slots[i].done and not boundary(slots[i])]
        if not growing:
            break
        if not ahead:
            read()
        open_slots = [slots[i] for i in growing]
        for i, [choice] in zip(growing, tokens(run, open_slots, [1] * len(growing)), strict=True):
            slots[i] = _extended(run, slots[i], choice, begins=False)
    return slots


def _extended(run: Run, h: Hypothesis, choice: Choice, *, begins: bool) -> Hypothesis:
    _, stopped = run.until_stop(h.row, h.tokens, [choice.token])
    return Hypothesis(
        row=h.row,
        tokens=(*h.tokens, choice.token),
        logprobs=(*h.logprobs, choice.logprob),
        notes=(*h.notes, choice.note),
        done=stopped,
        parent=dataclasses.replace(h, parent=None) if begins else h.parent,
    )


def _stacked(live: Sequence[Hypothesis]) -> Tensor:
    scores = [h.scores for h in live if h.scores is not None]
    assert len(scores) == len(live), "hypotheses are read before tokens are chosen"
    return torch.stack(scores)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(i for i in range(most) if one[i] != other[i])
