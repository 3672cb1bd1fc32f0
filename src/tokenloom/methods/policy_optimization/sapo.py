"""SAPO: a sigmoid gate instead of a clip (arXiv 2511.20347).

f(r) = 4 / tau * sigmoid(tau * (r - 1)); objective_t = f(ratio_t) * A_t              [B, T], to maximize
tau_pos where A > 0, tau_neg elsewhere. f'(1) = 1, so the on-policy gradient is exactly A; away from 1 the
multiplier r * 4 s (1 - s) decays on both sides and never jumps. Deviations: none. Fidelity: code.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenloom.algorithm import Algorithm
from tokenloom.catalog import part, preset
from tokenloom.masked import clamped_exp
from tokenloom.methods.policy_optimization.importance import where_advantages


def _multiplier(ratio: Tensor, advantages: Tensor, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Tensor:
    gate = torch.sigmoid(_tau(advantages, tau_pos, tau_neg) * (ratio - 1))
    return ratio * 4 * gate * (1 - gate)


@part("sapo", stage="surrogate", scope="token", paper="arXiv:2511.20347", multiplier=_multiplier)
def sapo(log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Tensor:
    """Objective [B, T], zero off the mask; larger tau closes the gate faster.

    Raises:
        ValueError: for a temperature that is not positive.
    """
    if tau_pos <= 0 or tau_neg <= 0:
        raise ValueError(f"gate temperatures must be positive, got tau_pos={tau_pos}, tau_neg={tau_neg}")
    a = where_advantages(advantages, mask)
    tau = _tau(a, tau_pos, tau_neg)
    return 4 / tau * torch.sigmoid(tau * (clamped_exp(log_ratio, mask) - 1)) * a


def _tau(advantages: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    positive = torch.full_like(advantages, tau_pos)
    return torch.where(advantages > 0, positive, torch.full_like(advantages, tau_neg))


@preset("sapo", paper="arXiv:2511.20347")
def sapo_preset(*, dialect: Literal["paper", "trl"] = "paper") -> Algorithm:
    """SAPO with GRPO's advantage and the sequence mean. Dialect "trl": std eps 1e-4, all rows counted."""
    trl = dialect == "trl"
    return Algorithm.compose(
        advantage={"part": "grpo", "eps": 1e-4 if trl else 1e-6},
        surrogate="sapo",
        aggregate={"part": "sequence-mean", "rows": "all" if trl else "live"},
    )
