"""AAPO: advantage momentum, the lead over the reference model's own reward (arXiv 2505.14264).

A*_i = (R_i - mean_g R) / (std_g R + 1e-4) + clip(R_i - R_ref_i, low, high)                          [B, T]
objective_t = A* logprob_t, averaged over the sampled tokens: no ratio, no clip, no KL.
R_ref_i is the reward of one response of the frozen reference to the same prompt; which one stands beside which
row is arbitrary (`pairing`: "row", or "mean" for the group's mean). A constant group still learns from the
second term. Rows without a reward on either side get no momentum. Deviations: none. R = R_ref is GRPO's
advantage. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import group_mean, where_mask


@part("aapo", stage="credit", scope="group", paper="arXiv:2505.14264")
def aapo(
    advantages: Tensor,
    rewards: Tensor,
    reference_rewards: Tensor,
    group_ids: Tensor,
    mask: Tensor,
    *,
    low: float = -0.2,
    high: float = 0.28,
    pairing: Literal["row", "mean"] = "row",
) -> Tensor:
    """Advantages [B, T] plus the clipped difference to the reference's reward.

    Raises:
        ValueError: unless low <= high.

    >>> one, group = torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    >>> aapo(torch.zeros(2, 1), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), group, one)
    tensor([[ 0.2800],
            [-0.2000]])
    """
    if low > high:
        raise ValueError(f"the momentum is clipped to [low, high], got low={low}, high={high}")
    reference = reference_rewards.to(rewards.dtype)
    if pairing == "mean":
        known = ~reference.isnan()
        reference = torch.where(known, group_mean(reference, group_ids, known), reference)
    lead = (rewards - reference).clamp(low, high)
    return where_mask(advantages + torch.where(lead.isnan(), torch.zeros_like(lead), lead)[:, None], mask)


@preset("aapo", paper="arXiv:2505.14264")
def aapo_preset(*, low: float = -0.2, high: float = 0.28, pairing: Literal["row", "mean"] = "row") -> Algorithm:
    """GRPO's advantage (std eps 1e-4) plus momentum, weighted log-likelihood, token mean."""
    return Algorithm.compose(
        advantage={"part": "grpo", "eps": 1e-4},
        credit=[{"part": "aapo", "low": low, "high": high, "pairing": pairing}],
        surrogate="reinforce/score",
        aggregate="token-mean",
    )
