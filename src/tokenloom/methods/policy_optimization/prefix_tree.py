"""The prefix tree of a group: which responses share their first t tokens, and what such a prefix is worth.

Node (i, t) is the state after the first t response tokens of row i, tool output included; rows of a group
share it while their tokens agree. The state after a response's last token is terminal: only an identical
response shares it, so that neither padding nor a longer response counts as one.              [B, T + 1]
Value of a node = mean reward of the rows through it, a Monte-Carlo estimate of V(prefix).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.masked import group_index, where_mask


def prefix_nodes(tokens: Tensor, lengths: Tensor, group_ids: Tensor) -> Tensor:
    """Node numbers [B, T + 1] int64, exact (no hashing): equal numbers are one state.

    Once all rows went apart a row keeps its last number, since the later states are its own anyway.

    >>> prefix_nodes(torch.tensor([[1, 2], [1, 3], [1, 3]]), torch.tensor([2, 2, 2]), torch.tensor([5, 5, 5]))
    tensor([[0, 1, 2],
            [0, 1, 3],
            [0, 1, 3]])
    """
    rows, width = tokens.shape
    node, number = group_index(group_ids)
    columns, total = [node], number
    for t in range(width):
        if number == rows:
            break
        # A last token is another symbol than the same token with more behind it; after the end there is only one.
        symbol = torch.where(t < lengths, 2 * tokens[:, t] + (lengths == t + 1), -1)
        node, number = _pairs(node, symbol)
        columns.append(node + total)
        total += number
    columns += [columns[-1]] * (width + 1 - len(columns))
    return torch.stack(columns, -1)


def prefix_values(nodes: Tensor, rewards: Tensor, counted: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """Mean reward of the `counted` rows [B] through each node, [B, T + 1]; 0 for nodes without any.

    `row_weights` [B] is the probability with which branching drew a row (1 / number of branches, multiplied
    along its path); with it the value of a node is the mean of its children's. Equal rewards give exactly
    their value, since the rounding of a mean would otherwise pass for a difference.
    """
    if not nodes.numel():
        return rewards.new_zeros(nodes.shape)
    size = int(nodes.max()) + 1
    flat = nodes.reshape(-1)

    def everywhere(x: Tensor) -> Tensor:
        return x[:, None].expand(nodes.shape).reshape(-1)

    def extreme(fill: float, reduce: str) -> Tensor:
        start = rewards.new_full((size,), fill)
        return start.scatter_reduce_(0, flat, everywhere(where_mask(rewards, counted, fill)), reduce)

    weight = counted.to(rewards.dtype) if row_weights is None else where_mask(row_weights.to(rewards.dtype), counted)
    total = rewards.new_zeros(size).index_add_(0, flat, everywhere(weight * where_mask(rewards, counted)))
    count = rewards.new_zeros(size).index_add_(0, flat, everywhere(weight))
    mean = torch.where(count > 0, total / torch.where(count > 0, count, torch.ones_like(count)), total)
    top = extreme(float("-inf"), "amax")
    return torch.where(top == extreme(float("inf"), "amin"), top, mean)[nodes]


def next_decision(mask: Tensor) -> Tensor:
    """For each token the index of the state in which the policy acts next, [B, T] int64 in 1..T.

    That is the state before the next sampled token, so that tool output in between belongs to the transition;
    after the last one it is the terminal state T.
    """
    width = mask.shape[1]
    index = torch.where(mask, torch.arange(width, device=mask.device), width)
    later = torch.cat([index[:, 1:], index.new_full((len(index), 1), width)], -1)[:, :width]
    return later.flip(-1).cummin(-1).values.flip(-1) if width else later


def _pairs(a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    """Dense numbers [B] of the pairs (a, b) and how many there are."""
    dense, n = group_index(b)
    return group_index(a * n + dense)
