"""Shapes of draft trees, grown where drafts have come true.

A shape says which ranks of children a tree has, before any token is known, so that the drafts' law does not depend on
it. How often the child of rank j came true below an accepted node is counted by depth and by `key`, what the drafter
knows of its own chances (such as the length of a match). A shape of n nodes holds the n most probable ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tokenloom.methods.decoding.draft_tree import ROOT, DraftTree

_DEPTHS = 4
_STRENGTH = 4.0
"""Observations that the first guess is worth."""
_MEMORY = 0.99
_FRESH = 8
"""Rounds for which a grown shape is kept."""


@dataclass(frozen=True)
class Shape:
    """Parents and ranks of the nodes of a tree, each behind its parent, children by rank."""

    parents: Sequence[int]
    ranks: Sequence[int]

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> list[int]:
        """The depth of each node, 1 below the root."""
        found: list[int] = []
        for parent in self.parents:
            found.append(1 if parent == ROOT else found[parent] + 1)
        return found

    @cached_property
    def children(self) -> dict[int, int]:
        """The number of children by parent."""
        found: dict[int, int] = {}
        for parent in self.parents:
            found[parent] = found.get(parent, 0) + 1
        return found

    def cut(self, depth: int) -> Shape:
        """The nodes down to `depth`."""
        if not self.depths or max(self.depths) <= depth:
            return self
        return self._only([node for node, at in enumerate(self.depths) if at <= depth])

    def first(self, count: int) -> Shape:
        """The first `count` nodes, each behind its parent, the children of rank 0 next to their parents.

        An accepted path of first children then lies in the cache where it must stay.
        """
        below: dict[int, list[int]] = {}
        for node in range(min(count, len(self))):
            below.setdefault(self.parents[node], []).append(node)
        order, waiting = list[int](), below.get(ROOT, [])[::-1]
        while waiting:
            order.append(waiting.pop())
            waiting += below.get(order[-1], [])[::-1]
        return self._only(order)

    def _only(self, nodes: list[int]) -> Shape:
        places = {node: place for place, node in enumerate(nodes)} | {ROOT: ROOT}
        return Shape([places[self.parents[n]] for n in nodes], [self.ranks[n] for n in nodes])


NOTHING = Shape([], [])


class Chances:
    """How often drafts came true, and the shapes that follow from it.

    Args:
        guess: first guess of the chance of each rank below an accepted node.
        keys: number of keys.
        branching: most children of the root and of other nodes.
        depth, nodes: most of a shape.
    """

    def __init__(
        self, guess: Sequence[float], *, keys: int, branching: tuple[int, int], depth: int, nodes: int
    ) -> None:
        self._guess = [max(g, 1e-3) for g in guess]
        self._branching, self._depth, self._nodes = branching, depth, nodes
        cells = keys * _DEPTHS * len(self._guess)
        self._offered, self._true = [0.0] * cells, [0.0] * cells
        self._grown: dict[int, tuple[Shape, list[float]]] = {}
        self._shapes: dict[tuple[int, int, int], Shape] = {}
        self._age = 0

    def chance(self, key: int, depth: int, rank: int) -> float:
        """Of the child of `rank` at `depth` (1 below the root), when its parent was accepted."""
        cell, guess = self._cell(key, depth, rank), self._guess[min(rank, len(self._guess) - 1)]
        return (self._true[cell] + _STRENGTH * guess) / (self._offered[cell] + _STRENGTH)

    def note(self, key: int, tree: DraftTree, path: Sequence[int]) -> None:
        """What came true of a tree whose root had `key`."""
        taken = set(path)
        for depth, node in enumerate((ROOT, *path), 1):
            for rank, child in enumerate(tree.children.get(node, ())):
                cell = self._cell(key, depth, rank)
                self._offered[cell] = self._offered[cell] * _MEMORY + 1
                self._true[cell] = self._true[cell] * _MEMORY + (child in taken)
        self._age += 1
        if self._age % _FRESH == 0:
            self._grown.clear()
            self._shapes.clear()

    def sums(self, key: int) -> list[float]:
        """The number of drafts that the best shape of n nodes is expected to bring, for n = 0, 1, ..."""
        return self._best(key)[1]

    def shape(self, key: int, nodes: int, depth: int) -> Shape:
        """The shape of at most `nodes` nodes and `depth`."""
        asked = key, nodes, min(depth, self._depth)
        if asked not in self._shapes:
            self._shapes[asked] = self._best(key)[0].first(nodes).cut(depth)
        return self._shapes[asked]

    def _best(self, key: int) -> tuple[Shape, list[float]]:
        """Nodes in order of the chance that they are accepted, and the sums of those chances."""
        if key in self._grown:
            return self._grown[key]
        parents, ranks, depths, sums = list[int](), list[int](), list[int](), [0.0]
        waiting = [(-self.chance(key, 1, 0), ROOT, 0, 1, 1.0)]
        while waiting and len(parents) < self._nodes:
            negative, parent, rank, depth, above = heapq.heappop(waiting)
            node = len(parents)
            parents.append(parent)
            ranks.append(rank)
            depths.append(depth)
            sums.append(sums[-1] - negative)
            if rank + 1 < self._branching[depth > 1]:
                # A sibling is drawn after this one, however it fared so far.
                chance = min(above * self.chance(key, depth, rank + 1), -negative)
                heapq.heappush(waiting, (-chance, parent, rank + 1, depth, above))
            if depth < self._depth:
                heapq.heappush(waiting, (negative * self.chance(key, depth + 1, 0), node, 0, depth + 1, -negative))
        self._grown[key] = Shape(parents, ranks), sums
        return self._grown[key]

    def _cell(self, key: int, depth: int, rank: int) -> int:
        ranks = len(self._guess)
        return (key * _DEPTHS + min(depth, _DEPTHS) - 1) * ranks + min(rank, ranks - 1)
