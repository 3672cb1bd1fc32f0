"""Prefix trees: rows that begin alike share what they share, so each distinct prefix is computed once.

Rows are sorted, which puts equal prefixes side by side; a row adds a node for each token behind the part it
shares with the row before. Nodes are numbered in that order, so the nodes below a node are a range: `a` is an
ancestor of `b` exactly when enter[a] = a <= b < leave[a].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKED = torch.finfo(torch.bfloat16).min
"""Added to the score of a hidden key; finite in every format that attention runs in."""


@dataclass(frozen=True)
class PrefixTree:
    """One or several trees over token rows, nodes in depth-first order.

    `tokens`, `depth`, `leave` [M] int64: the node's token, its position in the row, and the first node behind its
    descendants. `nodes` maps each row's number to the node of each of its positions [length].
    """

    tokens: Tensor
    depth: Tensor
    leave: Tensor
    nodes: dict[int, Tensor]

    def __len__(self) -> int:
        return int(self.tokens.numel())


def sorted_rows(rows: Sequence[Sequence[int]]) -> list[int]:
    """Numbers of the rows in lexicographic order: neighbors share the longest prefixes."""
    return sorted(range(len(rows)), key=lambda i: tuple(rows[i]))


def shared_lengths(rows: Sequence[Tensor]) -> list[int]:
    """How many tokens each row shares with the row before it; 0 for the first."""
    shared = [0] * len(rows)
    for i in range(1, len(rows)):
        n = min(len(rows[i - 1]), len(rows[i]))
        differ = (rows[i - 1][:n] != rows[i][:n]).nonzero()
        shared[i] = int(differ[0]) if len(differ) else n
    return shared


def build_tree(numbers: Sequence[int], rows: Sequence[Tensor], shared: Sequence[int]) -> PrefixTree:
    """The trees of non-empty `rows` (int64 [length_i]) in sorted order, `numbers` being what they are called."""
    nodes: dict[int, Tensor] = {}
    tokens, depths = [], []
    size = sum(len(row) - common for row, common in zip(rows, shared, strict=True))
    leave = torch.full((size,), size, dtype=torch.int64)
    path = torch.zeros(0, dtype=torch.int64)
    count = 0
    for number, row, common in zip(numbers, rows, shared, strict=True):
        # Whatever the last row had behind the shared part is complete.
        leave[path[common:]] = count
        fresh = torch.arange(count, count + len(row) - common)
        path = torch.cat([path[:common], fresh])
        nodes[number] = path
        tokens.append(row[common:])
        depths.append(torch.arange(common, len(row)))
        count += len(fresh)
    leave[path] = count
    # Nodes that an earlier row closed keep their range; those on the last path end with the tree.
    return PrefixTree(torch.cat(tokens), torch.cat(depths), leave, nodes)


def pad_tree(tree: PrefixTree, multiple: int) -> PrefixTree:
    """The tree with nodes appended that stand alone, until their number is a multiple of `multiple`."""
    count = -len(tree) % multiple
    leave = torch.arange(len(tree), len(tree) + count) + 1
    # The last token again: some models search their input for a padding id and complain.
    tokens = tree.tokens[-1:].expand(count)
    return PrefixTree(
        torch.cat([tree.tokens, tokens]),
        torch.cat([tree.depth, torch.zeros_like(leave)]),
        torch.cat([tree.leave, leave]),
        tree.nodes,
    )


def ancestor_mask(tree: PrefixTree, *, window: int | None = None) -> Tensor:
    """bool [M, M]: query node (row) sees key node (column): ancestors and itself, within `window`."""
    node = torch.arange(len(tree))
    seen = (node[None, :] <= node[:, None]) & (node[:, None] < tree.leave[None, :])
    if window is not None:
        seen &= tree.depth[:, None] - tree.depth[None, :] < window
    return seen
