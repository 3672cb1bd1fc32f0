"""Balanced aggregation: token means taken apart in the positive and the negative half of a group (arXiv 2605.04077).

scale = n_side / (G * tokens_side * groups) on the mask                                 [B, T]
G: the group's rows; n_side: its rows whose A has that sign; tokens_side: their sampled tokens; groups: those of the
update. Signs keep the mass that the sequence mean gives them, whatever the lengths; within a sign every token counts
alike, as in the token mean. Limit: equal lengths (and group sizes) give both means.

Deviations: the paper has binary rewards. Rows with A = 0 are a third side, counted in G: their policy term is zero
anyway, and terms that share the scale (a KL) keep seeing them. A row's sign is that of its summed advantage, so
credit that differs by token does not tear a row apart. Rows without sampled tokens are not counted. Fidelity: paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import group_index, group_size, group_sum, masked_sum, to_tokens


@part("balanced-aggregation", stage="aggregate", scope="batch", paper="arXiv:2605.04077")
def balanced_aggregation(mask: Tensor, group_ids: Tensor, advantages: Tensor) -> Tensor:
    """Scale [B, T] with sum 1 over the mask; a side of a group sums to its share of rows over the number of groups.

    >>> group, advantages = torch.zeros(2, dtype=torch.int64), torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
    >>> balanced_aggregation(torch.tensor([[True, True], [True, False]]), group, advantages)
    tensor([[0.2500, 0.2500],
            [0.5000, 0.0000]])
    """
    sampled = mask.sum(-1)
    live = sampled > 0
    dense, _ = group_index(group_ids)
    sides = 3 * dense + masked_sum(advantages, mask, -1).sign().to(torch.int64)
    groups = torch.unique(group_ids[live]).numel()
    denominator = group_size(group_ids, live) * group_sum(sampled, sides) * groups
    share = group_size(sides, live).to(advantages.dtype) / denominator.clamp(min=1)
    return to_tokens(share, mask)


@preset("balanced-aggregation", paper="arXiv:2605.04077")
def balanced_aggregation_preset() -> Algorithm:
    """GRPO's advantage and PPO's clip under the balanced aggregation; no KL."""
    return Algorithm.compose(advantage="grpo", surrogate="ppo-clip", aggregate="balanced-aggregation")
