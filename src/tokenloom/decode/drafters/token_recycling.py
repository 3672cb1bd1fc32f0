"""Token Recycling as a drafter; see `tokenloom.methods.decoding.token_recycling`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from tokenloom.decode.drafters.base import EMPTY, Ask, Drafter, Drawing, Round, largest, vocabulary_of
from tokenloom.decode.drafters.best_first import Beliefs, Grown, best_first
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
    depth = 10

    def __init__(self, *, branches: int = 8, template: Literal["grown", "paper"] = "grown") -> None:
        if branches < 1:
            raise ValueError(f"token-recycling: branches is how many followers a token has, 1 or more; got {branches}")
        self._branches = branches
        self.branching = (branches, branches)
        self.fixed = Shape(*TEMPLATE).first(len(TEMPLATE[0])) if template == "paper" else None
        self.adjacency = empty_adjacency(0, branches=branches)
        self._probs = torch.zeros(0, branches)  # [V, k], among the k
        self._beliefs = Beliefs()

    @contextmanager
    def open(self, run: Run) -> Iterator[None]:
        """See `Drafter`."""
        vocab = vocabulary_of(run.model)
        if len(self.adjacency) != vocab:
            self.adjacency = empty_adjacency(vocab, branches=min(self._branches, vocab))
        if self._probs.shape != self.adjacency.shape:
            self._probs = torch.full(self.adjacency.shape, 1 / self.adjacency.shape[1])
        yield

    def key(self, row: int, text: list[int]) -> int | None:
        """See `Drafter`."""
        return None if int(self.adjacency[text[-1], 0]) == NONE else 0

    def grown(self, text: list[int], drawing: Drawing, nodes: int | None) -> Grown | None:
        """See `Drafter`."""
        if self.fixed is not None:
            return None
        root = text[-1]
        return best_first(lambda path: self._below(path[-1] if path else root), nodes=nodes, depth=self.depth)

    def _below(self, token: int) -> list[tuple[int, float]]:
        """What followed `token`, with the chances that it will again."""
        known = zip(self.adjacency[token].tolist(), self._probs[token].tolist(), strict=True)
        return [(follower, self._beliefs.chance(p)) for follower, p in known if follower != NONE]

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
        ids = torch.tensor(read)
        update(self.adjacency, ids, followers)
        update(self._probs, ids, values.float().softmax(-1))

    def _judge(self, done: Round) -> None:
        """What came true of a tree that the matrix gave."""
        taken = set(done.path)
        for node in (ROOT, *done.path):
            children = done.tree.children.get(node)
            if not children:
                continue
            token = done.text[-1] if node == ROOT else done.tree.tokens[node]
            probs = dict(zip(self.adjacency[token].tolist(), self._probs[token].tolist(), strict=True))
            for child in children:
                self._beliefs.note(probs[done.tree.tokens[child]], child in taken)
