"""Dual clip: bound the loss of tokens with negative advantage and large ratio (arXiv 1912.09729, eq. 5).

objective_t = max(min(r A, clip(r) A), cap * A) where A < 0, PPO's clip elsewhere      [B, T], to maximize
INTELLECT-2's two-sided clip (arXiv 2505.07291, TRL's `delta`) is the same function with cap = delta
whenever delta > hi. Limit: cap -> inf is PPO's clip. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.methods.policy_optimization.importance import where_advantages
from tokenloom.methods.policy_optimization.ppo_clip import Limit, clip_multiplier, ppo_clip


def _multiplier(ratio: Tensor, advantages: Tensor, lo: Limit, hi: Limit, cap: Limit) -> Tensor:
    inside = clip_multiplier(ratio, advantages, lo, hi)
    return torch.where((advantages < 0) & (ratio > cap), torch.zeros_like(inside), inside)


@part("dual-clip", stage="surrogate", scope="token", paper="arXiv:1912.09729", multiplier=_multiplier)
def dual_clip(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, lo: Limit = 0.8, hi: Limit = 1.2, cap: Limit = 3.0
) -> Tensor:
    """Objective [B, T], zero off the mask; `cap` > 1 is an absolute limit of the ratio.

    >>> one, ratio = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[5.0, 2.0]])
    >>> dual_clip(ratio.log(), torch.tensor([[-1.0, -1.0]]), one)
    tensor([[-3., -2.]])
    """
    objective, a = ppo_clip(log_ratio, advantages, mask, lo, hi), where_advantages(advantages, mask)
    # An infinite cap times a zero advantage would be NaN, so the floor is built on negative advantages only.
    negative = a < 0
    floor = torch.where(negative, cap * torch.where(negative, a, -torch.ones_like(a)), objective.detach())
    return torch.where(negative, torch.maximum(objective, floor), objective)


@preset("dual-clip", paper="arXiv:1912.09729")
def dual_clip_preset(*, dialect: Literal["verl", "trl"] = "verl", cap: float | None = None) -> Algorithm:
    """GRPO's advantage under the dual clip: cap 3 (verl), or INTELLECT-2's delta of 4 (trl)."""
    limit = cap if cap is not None else {"verl": 3.0, "trl": 4.0}[dialect]
    return Algorithm.compose(
        advantage={"part": "grpo", "eps": 1e-4 if dialect == "trl" else 1e-6},
        surrogate="dual-clip",
        bounds={"part": "clip", "cap": limit},
        aggregate="token-mean",
    )
