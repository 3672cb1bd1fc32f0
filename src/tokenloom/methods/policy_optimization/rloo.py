"""RLOO: the mean reward of the group's other responses as baseline (arXiv 2402.14740).

A_i = R_i - mean of R_k over k != i in the group = G / (G - 1) * (R_i - mean R)       broadcast to [B, T]
No division by a std. Unscorable rows (NaN) are left out of the baselines and get advantage 0. A group
with a single scorable row has no baseline: advantage 0 (single="zero", verl's vectorized form) or
the reward itself (single="reward", verl's loop form). Fidelity: code.

Dialect "trl": ratio of whole sequences (the product of the token ratios), clipped by 0.2, KL to the
reference subtracted from the reward (0.05 by default there; pass kl_coef).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import LOG_RATIO_LIMIT, group_constant, group_size, group_sum, to_tokens


@part("rloo", stage="advantage", scope="group", paper="arXiv:2402.14740")
def rloo(rewards: Tensor, group_ids: Tensor, mask: Tensor, *, single: Literal["zero", "reward"] = "zero") -> Tensor:
    """Advantages [B, T]; within a group they sum to zero over rows, exactly zero when rewards are equal.

    >>> group, one = torch.zeros(4, dtype=torch.int64), torch.ones(4, 1, dtype=torch.bool)
    >>> rloo(torch.tensor([1.0, 0.0, 0.0, 1.0]), group, one).squeeze(-1)
    tensor([ 0.6667, -0.6667, -0.6667,  0.6667])
    """
    scored = ~rewards.isnan()
    others = (group_size(group_ids, scored) - 1).to(rewards.dtype)
    reward = torch.where(scored, rewards, torch.zeros_like(rewards))
    advantages = reward - (group_sum(reward, group_ids) - reward) / others.clamp(min=1)
    advantages = torch.where(group_constant(rewards, group_ids, scored), torch.zeros_like(reward), advantages)
    alone = reward if single == "reward" else torch.zeros_like(reward)
    advantages = torch.where(others < 1, alone, advantages)
    return to_tokens(torch.where(scored, advantages, torch.zeros_like(advantages)), mask)


@preset("rloo", paper="arXiv:2402.14740")
def rloo_preset(*, dialect: Literal["paper", "trl"] = "paper", kl_coef: float = 0.0) -> Algorithm:
    """RLOO: leave-one-out baseline on policy; KL to the reference, if any, is subtracted from the reward."""
    reward = [{"part": "kl/in-reward", "coef": kl_coef, "per": "row"}] if kl_coef else []
    if dialect == "trl":
        return Algorithm.compose(
            reward=reward,
            advantage="rloo",
            log_ratio={"part": "gspo", "normalize": False, "limit": LOG_RATIO_LIMIT},
            surrogate="ppo-clip",
            aggregate={"part": "sequence-mean", "rows": "all"},
        )
    return Algorithm.compose(
        reward=reward,
        advantage="rloo",
        surrogate="reinforce/score",
        aggregate={"part": "dr-grpo/constant-length", "divisor": "one"},
    )
