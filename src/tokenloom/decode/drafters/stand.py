"""STAND as a drafter; see `tokenloom.methods.decoding.stand`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from tokenloom.decode.drafters.base import Ask, Drafter, Drawing, Round, drawn, filled, largest
from tokenloom.decode.drafters.best_first import Beliefs, Grown, Limits, best_first
from tokenloom.decode.registry import decoder
from tokenloom.decode.shapers import wide
from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree, SparseLaw
from tokenloom.methods.decoding.stand import NGramTable, stand

_SURE = (0.4, 0.7, 0.95)
"""Probabilities of the likeliest token that part classes of chances."""


@decoder("stand", kind="drafter")
class Stand(Drafter):
    """Draws from the laws that the target had after the same n-gram, n up to `longest`, `kept` tokens of each.

    All rows and all calls share the table, until `reset`.
    """

    slug = "stand"
    misses = True
    draws = True
    guess = (0.5, 0.12, 0.06, 0.04, 0.03, 0.02)
    depth = 8

    def __init__(self, *, longest: int = 4, kept: int = 10) -> None:
        self._longest, self._kept = longest, kept
        self.keys, self.branching = longest * (len(_SURE) + 1), (kept, kept)
        self.reset()

    def reset(self) -> None:
        """Forget all n-grams, before another problem."""
        self.table = NGramTable(longest=self._longest, kept=self._kept)
        self._beliefs = Beliefs(self._longest)

    def key(self, row: int, text: list[int]) -> int | None:
        """See `Drafter`: the length of the n-gram that is known, and how sure its law is."""
        n, found = stand(self.table, text[-self._longest :])
        if found is None:
            return None
        return (n - 1) * (len(_SURE) + 1) + bisect_right(_SURE, found[1][0])

    def grown(self, text: list[int], drawing: Drawing, limits: Limits) -> Grown | None:
        """See `Drafter`; drawn tokens are not known before their number is."""
        if drawing != "given":
            return None
        end = text[-self._longest :]
        return best_first(lambda path: self._below([*end, *path]), self._beliefs, limits, depth=self.depth)

    def _below(self, context: list[int]) -> tuple[Sequence[int], Sequence[int]]:
        """What followed `context`, and the cells of its chances to follow again."""
        n, found = stand(self.table, context[-self._longest :])
        if found is None:
            return (), ()
        return found[0], [self._beliefs.cell(p, n - 1) for p in found[1]]

    def draft(self, asks: Sequence[Ask]) -> list[DraftTree]:
        """See `Drafter`."""
        return [self._tree(ask) for ask in asks]

    def _tree(self, ask: Ask) -> DraftTree:
        end = ask.text[-self._longest :]

        def followers(path: list[int], count: int) -> tuple[list[int], SparseLaw | None]:
            _, found = stand(self.table, [*end, *path][-self._longest :])
            if found is None:
                return [], None
            ids, probs = found
            if ask.drawing == "given":
                return list(ids[:count]), None
            law = torch.tensor(probs, dtype=torch.float64)
            return [ids[i] for i in drawn(law, count, ask.drawing, ask.draw)], (torch.tensor(ids), law)

        return filled(ask.shape, followers)

    def learn(self, rounds: Sequence[Round], scores: Tensor) -> None:
        """See `Drafter`: the laws behind the text and every accepted token."""
        for done in rounds:
            self._judge(done)
        if rounds[0].shaped is None:
            at = [(row, place) for row, done in enumerate(rounds) for place in done.at]
            rows, places = torch.tensor(at, device=scores.device).unbind(1)
            shaped = scores[rows, places]
        else:
            shaped = torch.stack([s for done in rounds for s in done.shaped or ()])
        values, ids = largest(wide(shaped), self._kept)
        # Those that processors ruled out have no mass.
        laws = iter(zip(ids.tolist(), values.softmax(-1).tolist(), strict=True))
        for done in rounds:
            context = done.text[-self._longest :]
            for node in (None, *done.path):
                if node is not None:
                    context.append(done.tree.tokens[node])
                tokens, probs = next(laws)
                self.table.add(context[-self._longest :], (tuple(tokens), tuple(probs)))

    def _judge(self, done: Round) -> None:
        """What came true of a tree that the table gave."""
        taken, context = set(done.path), done.text[-self._longest :]
        for node in (ROOT, *done.path):
            if node != ROOT:
                context.append(done.tree.tokens[node])
            children = done.tree.children.get(node)
            if not children:
                continue
            cells = dict(zip(*self._below(context), strict=True))
            for child in children:
                self._beliefs.note(cells[done.tree.tokens[child]], child in taken)
