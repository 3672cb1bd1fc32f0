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
"""Nodes of a tree whose size is left open."""


class Beliefs:
    """How often a token came true that had the probability p when it was last seen, by p and by `kinds` of source."""

    def __init__(self, kinds: int = 1, *, trust: float = 0.8) -> None:
        """`trust`: the first guess is p times it."""
        ends = (0.0, *_EDGES, 1.0)
        guesses = [trust * (a + b) / 2 for a, b in pairwise(ends)] * kinds
        self._true = [_STRENGTH * guess for guess in guesses]
        self._offered = [_STRENGTH] * len(guesses)

    def cell(self, p: float, kind: int = 0) -> int:
        """The class of tokens that had about this probability."""
        return kind * (len(_EDGES) + 1) + bisect_right(_EDGES, p)

    def chance(self, cell: int) -> float:
        """Of a token below an accepted node."""
        return self._true[cell] / self._offered[cell]

    def note(self, cell: int, came_true: bool) -> None:
        """A token below an accepted node did or did not come true."""
        self._true[cell] = self._true[cell] * _MEMORY + came_true
        self._offered[cell] = self._offered[cell] * _MEMORY + 1


@dataclass(frozen=True)
class Grown:
    """A shape, likeliest node first, and how many of its first n nodes are expected to come true, n = 0, 1, ..."""

    shape: Shape
    sums: list[float]


Followers = Callable[[list[int]], tuple[Sequence[int], Sequence[int]]]
"""From the tokens of a path to those below it, best first, and their cells in `Beliefs`."""


@dataclass(frozen=True)
class Limits:
    """Of a tree: its size if that is settled, and the chance of a node below which reading it is never worth while."""

    nodes: int | None = None
    least: float = 0.0


def best_first(followers: Followers, beliefs: Beliefs, limits: Limits, *, depth: int) -> Grown:
    """The likeliest nodes, as far as there are tokens and `limits` let them in."""
    most, least = (_MOST, limits.least) if limits.nodes is None else (limits.nodes, 0.0)
    parents, ranks, sums = list[int](), list[int](), [0.0]
    waiting: list[tuple[float, int, int, float, list[int], tuple[Sequence[int], Sequence[int]]]] = []

    def offer(
        parent: int, rank: int, above: float, path: list[int], below: tuple[Sequence[int], Sequence[int]]
    ) -> None:
        if rank < len(below[0]):
            chance = above * beliefs.chance(below[1][rank])
            if chance >= least:
                heapq.heappush(waiting, (-chance, parent, rank, above, path, below))

    offer(ROOT, 0, 1.0, [], followers([]))
    while waiting and len(parents) < most:
        negative, parent, rank, above, path, below = heapq.heappop(waiting)
        node = len(parents)
        parents.append(parent)
        ranks.append(rank)
        sums.append(sums[-1] - negative)
        offer(parent, rank + 1, above, path, below)
        if len(path) + 1 < depth:
            longer = [*path, below[0][rank]]
            offer(node, 0, -negative, longer, followers(longer))
    return Grown(Shape(parents, ranks), sums)
