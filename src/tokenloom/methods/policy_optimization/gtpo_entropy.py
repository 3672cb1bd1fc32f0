"""GTPO and GRPO-S: rewards shared out by entropy among the right and among the wrong responses (arXiv 2508.04349).

Per group, O+ are the rows with reward above the threshold, O- the others. With H the policy's entropy in nats:
GTPO, of a token at position t:   O+:  a1 R_i + a2 H_it / mean of H_kt over O+ rows that have a token at t
                                  O-:  -a1 - a2 (1 / H_jt) / mean of 1 / H_kt over O- rows that have one     [B, T]
GRPO-S, of a row: the same with the row's mean entropy, over the rows of its side                               [B]
(H_it / sum * count is H_it / mean.) Uncertain right tokens earn more, confident wrong ones lose more. Advantages
are z-scores by side (population std, eps under the root): of the rewards of O+ with zeros in the place of
O-, and of those of O- with zeros in the place of O+. GRPO-S takes the arithmetic mean of a row's token ratios.

population="own" leaves the zeros out, which is the literal reading: then half of the right tokens are pushed down.
A group with one side only has no contrast and gets 0; one_sided=True normalizes the lone side, where the
entropy alone would decide at full strength, since dividing by the std cancels a2. Equal entropies and lengths
are GRPO with the population std. Deviations: token mean over the batch instead of each group. No code was released.
Fidelity: reconstructed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import (
    clamped_exp,
    group_constant,
    group_index,
    group_mean,
    group_size,
    masked_mean,
    to_tokens,
    where_mask,
)
from tokenloom.methods.policy_optimization.token_ratio import token_ratio

_PAPER = "arXiv:2508.04349"


@part("gtpo-entropy/token-rewards", stage="reward", scope="group", paper=_PAPER)
def entropy_token_rewards(
    rewards: Tensor,
    entropies: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    *,
    outcome: float = 1.0,
    bonus: float = 0.1,
    threshold: float = 0.5,
    eps: float = 1e-8,
) -> Tensor:
    """Token rewards [B, T], positive on right rows, negative on wrong ones; NaN in rows without a reward.

    `outcome` and `bonus` are the paper's alpha 1 and 2; with right rewards of 1 the O+ tokens of a position sum to
    (outcome + bonus) times their number.
    """
    right, wrong = (rewards > threshold)[:, None] & mask, (rewards <= threshold)[:, None] & mask
    h = where_mask(entropies.detach(), mask).clamp(min=0)
    earned = outcome * rewards[:, None] + bonus * _relative(h, _column_mean(h, group_ids, right))
    inverse = 1 / (h + eps)
    lost = outcome + bonus * _relative(inverse, _column_mean(inverse, group_ids, wrong))
    shaped = where_mask(earned, right) - where_mask(lost, wrong)
    return torch.where(mask & rewards.isnan()[:, None], torch.full_like(shaped, float("nan")), shaped)


@part("gtpo-entropy/row-rewards", stage="reward", scope="group", paper=_PAPER)
def entropy_row_rewards(
    rewards: Tensor,
    entropies: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    *,
    outcome: float = 1.0,
    bonus: float = 0.1,
    threshold: float = 0.5,
    eps: float = 1e-8,
) -> Tensor:
    """Rewards [B], positive on right rows, negative on wrong ones; rows without sampled tokens share in no bonus."""
    sampled = mask.any(-1)
    right, wrong = (rewards > threshold) & sampled, (rewards <= threshold) & sampled
    h = masked_mean(entropies.detach(), mask, -1).clamp(min=0)
    earned = bonus * where_mask(_relative(h, group_mean(h, group_ids, right)), right)
    inverse = 1 / (h + eps)
    lost = bonus * where_mask(_relative(inverse, group_mean(inverse, group_ids, wrong)), wrong)
    return torch.where(rewards <= threshold, -outcome * torch.ones_like(h) - lost, outcome * rewards + earned)


@part("gtpo-entropy", stage="advantage", scope="group", paper=_PAPER)
def gtpo_entropy(
    rewards: Tensor,
    token_rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    *,
    per: Literal["token", "row"] = "token",
    population: Literal["all", "own"] = "all",
    one_sided: bool = False,
    eps: float = 1e-8,
) -> Tensor:
    """Advantages [B, T]: z-scores of shaped rewards (of tokens or of rows), each side of a group by itself.

    A row's side is the sign of its reward, which the reward parts of this method set.
    """
    scored = mask & ~rewards.isnan()[:, None]
    if per == "token":
        x, counted = token_rewards, scored
    else:
        x, counted = rewards[:, None], scored.any(-1, keepdim=True)
    live = counted.any(-1)
    contrast = (group_size(group_ids, live & (rewards > 0)) > 0) & (group_size(group_ids, live & (rewards < 0)) > 0)
    flat, ids = x[counted], group_ids[:, None].expand(x.shape)[counted]
    found = torch.zeros_like(flat)
    for side in (rewards > 0, rewards < 0):
        own = side[:, None].expand(x.shape)[counted]
        found = torch.where(own, _z_score(where_mask(flat, own), ids, own if population == "own" else None, eps), found)
    scores = torch.zeros_like(x).masked_scatter(counted, found)
    return where_mask(scores, scored & (contrast | one_sided)[:, None])


@part("gtpo-entropy/mean-ratio", stage="log_ratio", scope="row", paper=_PAPER)
def mean_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log of the arithmetic mean of the row's token ratios [B, T], constant along the row, zero off the mask.

    >>> mean_ratio(torch.tensor([[0.2, 0.1]]), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)).exp()
    tensor([[1.1633, 1.1633]])
    """
    ratio = masked_mean(clamped_exp(token_ratio(logprobs, old_logprobs, mask), mask), mask, -1)
    log_ratio = torch.where(mask.any(-1), ratio, torch.ones_like(ratio)).log()
    return to_tokens(log_ratio, mask)


def _z_score(x: Tensor, ids: Tensor, where: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(population variance + eps) within groups, [N]; 0 where a group's values are equal."""
    deviation = x - group_mean(x, ids, where)
    score = deviation / (group_mean(deviation**2, ids, where) + eps).sqrt()
    return torch.where(group_constant(x, ids, where), torch.zeros_like(score), score)


def _relative(x: Tensor, mean: Tensor) -> Tensor:
    """x / mean; 1, an equal share, where the mean is 0."""
    return torch.where(mean > 0, x / torch.where(mean > 0, mean, torch.ones_like(mean)), torch.ones_like(x))


def _column_mean(x: Tensor, group_ids: Tensor, where: Tensor) -> Tensor:
    """Mean of `x` over the group's rows of `where`, position by position: [B, T]."""
    dense, n = group_index(group_ids)
    empty = x.new_zeros(n, x.shape[1])
    total = empty.index_add(0, dense, where_mask(x, where))
    return (total / empty.index_add(0, dense, where.to(x.dtype)).clamp(min=1))[dense]


@preset("gtpo-entropy", paper=_PAPER)
def gtpo_entropy_preset(
    *,
    variant: Literal["gtpo", "grpo-s"] = "gtpo",
    population: Literal["all", "own"] = "all",
    outcome: float = 1.0,
    bonus: float = 0.1,
    low: float = 0.2,
    high: float = 0.2,
) -> Algorithm:
    """GTPO (token rewards, token ratios, token mean) or GRPO-S (row rewards, mean ratio, sequence mean)."""
    tokens = variant == "gtpo"
    reward = {"part": f"gtpo-entropy/{'token' if tokens else 'row'}-rewards", "outcome": outcome, "bonus": bonus}
    shared: dict[str, Any] = {"surrogate": "ppo-clip", "bounds": {"part": "clip", "low": low, "high": high}}
    return Algorithm.compose(
        reward=[reward],
        advantage={"part": "gtpo-entropy", "per": "token" if tokens else "row", "population": population},
        log_ratio="token-ratio" if tokens else "gtpo-entropy/mean-ratio",
        aggregate="token-mean" if tokens else "sequence-mean",
        **shared,
    )
