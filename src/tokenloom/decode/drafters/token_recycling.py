"""Token Recycling as a drafter; see `tokenloom.methods.decoding.token_recycling`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from tokenloom.decode.drafters.base import EMPTY, Ask, Drafter, Drawing, Round, largest, vocabulary_of
from tokenloom.decode.drafters.best_first import Beliefs, Grown, Limits, best_first
from tokenloom.decode.drafters.shapes import Shape
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Run
from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree
from tokenloom.methods.decoding.token_recycling import NONE, TEMPLATE, empty_adjacency, token_recycling, update


@decoder("token-recycling", kind="drafter")
class TokenRecycling(Drafter):
    """A tree of the `branches` tokens that were likeliest after each token when it was last read.

    The matrix stays from call to call, as long as the vocabulary does. `template` "paper" drafts the 80 nodes of the
    paper in every round, which a GPU reads almost as fast as one; "grown" as many as pay, below the tokens that were
    most probable then.
    """

    slug = "token-recycling"
    misses = True
    depth = 10

    def __init__(self, *, branches: int = 8, template: Literal["grown", "paper"] = "grown") -> None:
        if branches < 1:
            raise ValueError(f"token-recycling: branches is how many followers a token has, 1 or more; got {branches}")
        self._branches = branches
        self.branching = (branches, branches)
        self.fixed = Shape(*TEMPLATE).first(len(TEMPLATE[0])) if template == "paper" else None
        self.adjacency = empty_adjacency(0, branches=branches)
        self._beliefs = Beliefs()
        # Rows of the matrix as lists, with the cells of what each follower's probability was among them.
        self._known: dict[int, tuple[list[int], list[int]]] = {}

    @contextmanager
    def open(self, run: Run) -> Iterator[None]:
        """See `Drafter`."""
        vocab = vocabulary_of(run.model)
        if len(self.adjacency) != vocab:
            self.adjacency = empty_adjacency(vocab, branches=min(self._branches, vocab))
            self._known = {}
        yield

    def key(self, row: int, text: list[int]) -> int | None:
        """See `Drafter`."""
        return 0 if self._below(text[-1])[0] else None

    def grown(self, text: list[int], drawing: Drawing, limits: Limits) -> Grown | None:
        """See `Drafter`."""
        if self.fixed is not None:
            return None
        root = text[-1]
        return best_first(lambda path: self._below(path[-1] if path else root), self._beliefs, limits, depth=self.depth)

    def _below(self, token: int) -> tuple[list[int], list[int]]:
        """What followed `token`, and the cells of its chances to follow again."""
        known = self._known.get(token)
        if known is None:
            ids = [follower for follower in self.adjacency[token].tolist() if follower != NONE]
            known = self._known[token] = ids, [self._beliefs.cell(1 / max(len(ids), 1))] * len(ids)
        return known

    def draft(self, asks: Sequence[Ask]) -> list[DraftTree]:
        """See `Drafter`."""
        return [
            token_recycling(self.adjacency, a.text[-1], (a.shape.parents, a.shape.ranks)) if len(a.shape) else EMPTY
            for a in asks
        ]

    def learn(self, rounds: Sequence[Round], scores: Tensor) -> None:
        """See `Drafter`."""
        for done in rounds:
            self._judge(done)
        read: list[int] = []
        places: list[int] = []
        for row, done in enumerate(rounds):
            tokens = [done.text[-1], *done.tree.tokens]
            read += tokens
            places += range(row * scores.shape[1], row * scores.shape[1] + len(tokens))
        flat = scores.flatten(0, 1)
        values, followers = largest(flat, self.adjacency.shape[1])
        if len(places) < len(flat):
            at = torch.tensor(places, device=followers.device)
            values, followers = values[at], followers[at]
        update(self.adjacency, torch.tensor(read), followers)
        cell = self._beliefs.cell
        for token, ids, probs in zip(read, followers.tolist(), values.float().softmax(-1).tolist(), strict=True):
            self._known[token] = ids, [cell(p) for p in probs]

    def _judge(self, done: Round) -> None:
        """What came true of a tree that the matrix gave."""
        taken = set(done.path)
        for node in (ROOT, *done.path):
            children = done.tree.children.get(node)
            if not children:
                continue
            cells = dict(zip(*self._below(done.text[-1] if node == ROOT else done.tree.tokens[node]), strict=True))
            for child in children:
                self._beliefs.note(cells[done.tree.tokens[child]], child in taken)
