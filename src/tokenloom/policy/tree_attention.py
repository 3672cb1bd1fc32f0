"""Attention over prefix trees in blocks of consecutive nodes, without a mask over all pairs.

For a block b of consecutive nodes, keys(b) being those that any of its nodes sees (ancestors of its first node, and
itself) and hidden(b) [n, K] being -inf where one does not see the other,
    out[b] = softmax(scale * query[b] @ key[keys(b)].T + hidden(b)) @ value[keys(b)]
The work is that of causal attention along every row, shared prefixes once. The backward recomputes a block's scores:
memory is O(heads x block x keys), never [M, M]. On a CPU in bf16 plain products are about twice as fast as PyTorch's
fused attention, and as exact as transformers' eager attention: scores are rounded, sums are in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenloom.policy.tree import PrefixTree

LANES = 32
"""A block's keys are filled up to a multiple of this: softmax in bf16 takes twice as long over a ragged end."""

BLOCK = 192
"""Longest piece of a chain that is one block; longer ones waste more on hidden keys than fewer calls save.

Twice that for a block of several chains.
"""

OVERHEAD = 12_000
"""What a block costs besides its scores, in scores of one head; measured on a CPU with the heads of a 135M model."""


@dataclass(frozen=True)
class Block:
    """Nodes `start` to `stop` and the ranges of nodes that hold their keys; `seen` bool [stop - start, K]."""

    start: int
    stop: int
    ranges: tuple[tuple[int, int], ...]
    seen: Tensor

    def keys(self, x: Tensor) -> Tensor:
        """[H, K, d]: the rows of `x` [H, M, d] at the block's keys."""
        parts = [x[:, a:b] for a, b in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def add_keys(self, total: Tensor, x: Tensor) -> None:
        """Add `x` [H, K, d] to `total` [H, M, d] at the block's keys."""
        at = 0
        for a, b in self.ranges:
            total[:, a:b].add_(x[:, at : at + b - a])
            at += b - a


class Blocks:
    """The blocks of a tree (or of several, node after node) under an optional window."""

    def __init__(self, tree: PrefixTree, window: int | None = None) -> None:
        self.blocks = [_block(tree, start, stop, window) for start, stop in _cut(tree)]
        self._hidden: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}

    def hidden(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """What each block adds to its scores, [n, K] in the scores' format: 0 or -inf."""
        key = (dtype, device)
        if key not in self._hidden:
            minus = torch.tensor(float("-inf"), dtype=dtype)
            self._hidden[key] = [torch.where(b.seen, minus.new_zeros(()), minus).to(device) for b in self.blocks]
        return self._hidden[key]


def tree_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """[H, M, d] from query, key and value [H, M, d] in one format; gradients reach all three, once."""
    apply: Callable[..., Tensor] = _TreeAttention.apply  # torch leaves it without a type
    return apply(query, key, value, blocks, scale)


class _TreeAttention(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float) -> Tensor:
        heads, nodes, size = value.shape
        # Nodes outermost: the layout in which models join the heads, which then costs no copy.
        out = value.new_empty(nodes, heads, size).transpose(0, 1)
        with torch.autocast(query.device.type, enabled=False):
            for block, hidden in zip(blocks.blocks, blocks.hidden(query.dtype, query.device), strict=True):
                p = _probabilities(query, block, hidden, block.keys(key), scale)
                out[:, block.start : block.stop] = torch.bmm(p, block.keys(value))
        ctx.save_for_backward(query, key, value)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        blocks, scale = ctx.blocks, ctx.scale
        wide = torch.promote_types(query.dtype, torch.float32)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        with torch.autocast(query.device.type, enabled=False):
            for block, hidden in zip(blocks.blocks, blocks.hidden(query.dtype, query.device), strict=True):
                here = slice(block.start, block.stop)
                k, g = block.keys(key), grad[:, here].contiguous()
                p = _probabilities(query, block, hidden, k, scale)
                block.add_keys(grad_value, torch.bmm(p.transpose(1, 2), g))
                # Turns d loss / d p into d loss / d scores; torch has the kernel, under a private name only.
                slope = torch._softmax_backward_data(torch.bmm(g, block.keys(value).transpose(1, 2)), p, -1, p.dtype)
                grad_query[:, here] = torch.bmm(slope, k).mul_(scale)
                block.add_keys(grad_key, torch.bmm(slope.transpose(1, 2), query[:, here]).mul_(scale))
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _probabilities(query: Tensor, block: Block, hidden: Tensor, keys: Tensor, scale: float) -> Tensor:
    rows = query[:, block.start : block.stop]
    scores = torch.baddbmm(hidden.expand(len(rows), *hidden.shape), rows, keys.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1)


def _cut(tree: PrefixTree) -> list[tuple[int, int]]:
    """Consecutive blocks over all nodes: chains in pieces of at most BLOCK, neighbors together where that is cheaper.

    A block costs rows x keys, and its keys are the ancestors of its first node and its own nodes.
    """
    fresh = (tree.depth[1:] != tree.depth[:-1] + 1) | (tree.leave[1:] != tree.leave[:-1])
    edges = [0, *(fresh.nonzero()[:, 0] + 1).tolist(), len(tree)]
    blocks: list[tuple[int, int]] = []
    for first, last in pairwise(edges):
        pieces = -((first - last) // BLOCK)
        cuts = [first + (last - first) * i // pieces for i in range(pieces + 1)]
        for start, stop in pairwise(cuts):
            if blocks and start == first and _joins(tree, *blocks[-1], stop):
                blocks[-1] = (blocks[-1][0], stop)
            else:
                blocks.append((start, stop))
    return blocks


def _joins(tree: PrefixTree, start: int, middle: int, stop: int) -> bool:
    def cost(a: int, b: int) -> int:
        return (b - a) * (int(tree.depth[a]) + b - a) + OVERHEAD

    return stop - start <= 2 * BLOCK and cost(start, stop) < cost(start, middle) + cost(middle, stop)


def _block(tree: PrefixTree, start: int, stop: int, window: int | None) -> Block:
    keys = torch.cat([(tree.leave[:start] > start).nonzero()[:, 0], torch.arange(start, stop)])
    rows = torch.arange(start, stop)[:, None]
    if window is not None:
        near = tree.depth[rows] - tree.depth[keys] < window
        keys = keys[(near & (rows < tree.leave[keys])).any(0)]
    # The nodes that follow fill the keys up, unseen.
    keys = torch.cat([keys, torch.arange(stop, min(stop + -len(keys) % LANES, len(tree)))])
    seen = (keys <= rows) & (rows < tree.leave[keys])
    if window is not None:
        seen &= tree.depth[rows] - tree.depth[keys] < window
    gaps = (keys[1:] - keys[:-1] != 1).nonzero()[:, 0] + 1
    firsts, lasts = keys[[0, *gaps.tolist()]], keys[[*(gaps - 1).tolist(), -1]]
    ranges = tuple((int(a), int(b) + 1) for a, b in zip(firsts, lasts, strict=True))
    return Block(start, stop, ranges, seen)
