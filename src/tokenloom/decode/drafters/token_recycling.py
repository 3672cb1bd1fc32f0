"""Token Recycling as a drafter; see `tokenloom.methods.decoding.token_recycling`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from tokenloom.decode.drafters.base import EMPTY, Ask, Drafter, Round, largest, vocabulary_of
from tokenloom.decode.drafters.shapes import Shape
from tokenloom.decode.registry import decoder
from tokenloom.decode.run import Run
from tokenloom.methods.decoding.draft_tree import DraftTree
from tokenloom.methods.decoding.token_recycling import NONE, TEMPLATE, empty_adjacency, token_recycling, update


@decoder("token-recycling", kind="drafter")
class TokenRecycling(Drafter):
    """A tree of the `branches` tokens that were likeliest after each token when it was last read.

    The matrix stays from call to call, as long as the vocabulary does. `template` "paper" drafts the 80 nodes of the
    paper in every round, which a GPU reads almost as fast as one; "grown" as many as pay, where drafts came true.
    """

    slug = "token-recycling"
    guess = (0.55, 0.13, 0.07, 0.05, 0.04, 0.03, 0.02, 0.02)
    depth = 7

    def __init__(self, *, branches: int = 8, template: Literal["grown", "paper"] = "grown") -> None:
        if branches < 1:
            raise ValueError(f"token-recycling: branches is how many followers a token has, 1 or more; got {branches}")
        self._branches = branches
        self.branching = (branches, branches)
        self.fixed = Shape(*TEMPLATE).first(len(TEMPLATE[0])) if template == "paper" else None
        self.adjacency = empty_adjacency(0, branches=branches)

    @contextmanager
    def open(self, run: Run) -> Iterator[None]:
        """See `Drafter`."""
        vocab = vocabulary_of(run.model)
        if len(self.adjacency) != vocab:
            self.adjacency = empty_adjacency(vocab, branches=min(self._branches, vocab))
        yield

    def key(self, row: int, text: list[int]) -> int | None:
        """See `Drafter`."""
        return None if int(self.adjacency[text[-1], 0]) == NONE else 0

    def draft(self, asks: Sequence[Ask]) -> list[DraftTree]:
        """See `Drafter`."""
        return [
            token_recycling(self.adjacency, a.text[-1], (a.shape.parents, a.shape.ranks)) if len(a.shape) else EMPTY
            for a in asks
        ]

    def learn(self, rounds: Sequence[Round], scores: Tensor) -> None:
        """See `Drafter`."""
        read: list[int] = []
        places: list[int] = []
        for row, done in enumerate(rounds):
            tokens = [done.text[-1], *done.tree.tokens]
            read += tokens
            places += range(row * scores.shape[1], row * scores.shape[1] + len(tokens))
        flat = scores.flatten(0, 1)
        followers = largest(flat, self.adjacency.shape[1])[1]
        if len(places) < len(flat):
            followers = followers[torch.tensor(places, device=followers.device)]
        update(self.adjacency, torch.tensor(read), followers)
