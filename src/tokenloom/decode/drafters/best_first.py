"""Trees that grow where a drafter itself believes in its tokens, the likeliest node of all first.

For drafts that are looked up, not drawn: then a tree may depend on its tokens and the law of the text stays the same.
Where a drafter holds the probability p of a token from when it last saw it, how often such a token comes true is
counted by p: `Beliefs`. The chance of a node is the product of the chances down to it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tokenloom.decode.drafters.shapes import Shape
from tokenloom.methods.decoding.draft_tree import ROOT

_EDGES = (0.01, 0.03, 0.06, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_STRENGTH = 6.0
"""Observations that the first guess is worth."""
_MEMORY = 0.995
_MOST = 48
_LEAST = 0.02
"""Nodes of a tree whose size is left open, and the chance of a node below which it is never worth reading."""


class Beliefs:
    """How often a token came true that had the probability p when it was last seen, by p and by `kinds` of source."""

    def __init__(self, kinds: int = 1, *, trust: float = 0.8) -> None:
        """`trust`: the first guess is p times it."""
        ends = (0.0, *_EDGES, 1.0)
        guesses = [trust * (a + b) / 2 for a, b in pairwise(ends)] * kinds
        self._true = [_STRENGTH * guess for guess in guesses]
        self._offered = [_STRENGTH] * len(guesses)

    def chance(self, p: float, kind: int = 0) -> float:
        """Of a token below an accepted node."""
        cell = kind * (len(_EDGES) + 1) + bisect_right(_EDGES, p)
        return self._true[cell] / self._offered[cell]

    def note(self, p: float, came_true: bool, kind: int = 0) -> None:
        """A token below an accepted node did or did not come true."""
        cell = kind * (len(_EDGES) + 1) + bisect_right(_EDGES, p)
        self._true[cell] = self._true[cell] * _MEMORY + came_true
        self._offered[cell] = self._offered[cell] * _MEMORY + 1


@dataclass(frozen=True)
class Grown:
    """A shape, likeliest node first, and how many of its first n nodes are expected to come true, n = 0, 1, ..."""

    shape: Shape
    sums: list[float]


Followers = Callable[[list[int]], Sequence[tuple[int, float]]]
"""From the tokens of a path to those below it, best first, with their chances."""


def best_first(followers: Followers, *, nodes: int | None, depth: int) -> Grown:
    """The tree of `nodes` nodes, as far as there are tokens; None: of those that may be worth reading."""
    most, least = (_MOST, _LEAST) if nodes is None else (nodes, 0.0)
    parents, ranks, sums = list[int](), list[int](), [0.0]
    waiting: list[tuple[float, int, int, float, list[int], Sequence[tuple[int, float]]]] = []

    def offer(parent: int, rank: int, above: float, path: list[int], below: Sequence[tuple[int, float]]) -> None:
        if rank < len(below) and above * below[rank][1] >= least:
            heapq.heappush(waiting, (-above * below[rank][1], parent, rank, above, path, below))

    offer(ROOT, 0, 1.0, [], followers([]))
    while waiting and len(parents) < most:
        negative, parent, rank, above, path, below = heapq.heappop(waiting)
        node = len(parents)
        parents.append(parent)
        ranks.append(rank)
        sums.append(sums[-1] - negative)
        offer(parent, rank + 1, above, path, below)
        if len(path) + 1 < depth:
            longer = [*path, below[rank][0]]
            offer(node, 0, -negative, longer, followers(longer))
    return Grown(Shape(parents, ranks), sums)
